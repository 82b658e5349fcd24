"""The CPU kernels: C++ without torch, compiled by `build` and called by `library`."""
