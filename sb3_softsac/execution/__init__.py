"""How updates are run: eagerly, in C++, compiled by torch or as a CUDA graph. ``gradient_step`` says what they are."""
