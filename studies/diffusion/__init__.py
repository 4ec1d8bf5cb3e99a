"""A small diffusion model learns a class that it has not seen, from 16 images.

  python -m studies.diffusion            # runs what is unfinished, and reports
  python -m studies.diffusion --report   # runs nothing, and reports

A row is appended to studies/diffusion/runs.jsonl when its run finishes, and is
never run again. The report and the figures are made from the rows alone.

The protocol was written on 2026-11-28, before the first run:

- **The base.** A diffusion transformer learns scikit-learn's digits of the
  classes 0 to 8. It predicts the noise. The schedule is the cosine of Nichol
  and Dhariwal, arXiv 2102.09672, with 1,000 times. The model reads the class.
  The embedding of the class 9 is never trained, as that of DreamBooth's rare
  word is not. 256 images of the old classes are held out.
- **The adaptation.** Adapters on all linear layers learn 16 images of the 9. As
  in the paper's runs of SDXL, both ranks are 4, alpha is twice the rank, a
  batch has 4 images, and the learning rate is constant. Both adapters share it.
  The optimizer is Adam. The paper adapts the attention alone for 500 steps.
  Here all linear layers are adapted, because the base is small. A run has 1,000
  steps, because their number is chosen.
- **The images of the 9** are split once: 64 to draw from, 58 for validation and
  58 for the test. A seed draws the 16 images, the adapters, the batches, the
  times and the noise. All methods of a seed share them.
- **The measure** is the denoising loss of the primary alone, with fixed times
  and noise. The main outcome is that on the test images of the 9. Forgetting is
  that on the held-out images of the old classes. That on the 16 images is
  measured too. An image has 8 draws of the noise, and an old one has 2. A final
  run samples 64 images by DDIM in 50 steps. The outcome is the share of them
  whose three nearest digits are mostly a 9.
- **Tuning.** Each method has ten points and the seeds 100 and 101. LoRA r=4 and
  LoRA r=8 have ten learning rates. A method with a rho has five values of it,
  each at the learning rate that won for LoRA r=4, and each at half of that
  rate. The number of steps is chosen too: the loss is measured every 100 steps.
  The point and the number with the lowest mean validation loss win; of equal
  ones, the first.
- **Final runs** have the seeds 0 to 9. Each method is compared with LoRA r=4 by
  exact sign-flip tests of paired differences. Holm's correction is over the
  four methods of an outcome. The loss after all 1,000 steps is reported too.
- **Gradients.** LoRA-SAM takes two gradients a step, and the others take one.

A control was added on the same day, when the results of the above were known.
LoRA r=4 may take 2,000 steps, which are as many gradients as LoRA-SAM's. It has
the learning rate that won for LoRA r=4, half of it and a quarter of it, and is
tuned with the same two seeds. It is not in Holm's correction.
The table of the old classes after all steps was added then too.
"""
