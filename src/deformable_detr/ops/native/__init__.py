"""The CPU kernels: C++ without torch, built by `build`, called by `library`."""
