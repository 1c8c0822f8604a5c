# A gated MLP, SiLU(a) x b, for GELU, of 8/3 C for 4 C width, so that the number of matrix weights
# stays (Shazeer, "GLU variants improve transformer", 2020). Not in the published study.

name = "swiglu"
activation = "swiglu"
