// Placeholder; see kernels.cpp.
extern "C" __attribute__((visibility("default"))) int kb_abi() { return 1; }
