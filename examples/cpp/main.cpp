// Computes with a model that `Exported.package` made, without Python: run LIBRARY MODEL.pt2 SIZE...
#include <dlfcn.h>

#include <cstdlib>
#include <iostream>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

// Let torch know the operators of block-sparse layers, whose kernels are in kronblocks' library
bool define_operators(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) {
    std::cerr << dlerror() << '\n';
    return false;
  }
  auto* define = reinterpret_cast<int (*)(int)>(dlsym(library, "kb_register"));
  if (define == nullptr || define(1) != 0) {
    std::cerr << path << " does not define the operators: give kronblocks' _native.so, made for this torch\n";
    return false;
  }
  return true;
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: run LIBRARY MODEL.pt2 SIZE...    the sizes of the input, such as 5 64\n";
    return 2;
  }
  if (!define_operators(argv[1])) return 1;
  std::vector<std::int64_t> sizes;
  for (int i = 3; i < argc; ++i) sizes.push_back(std::atoll(argv[i]));
  try {
    torch::InferenceMode guard;
    torch::inductor::AOTIModelPackageLoader loader(argv[2]);
    std::int64_t count = 1;
    for (auto size : sizes) count *= size;
    auto x = torch::linspace(-1, 1, count).view(sizes);
    auto y = loader.run({x});
    std::cout.precision(9);
    std::cout << y[0].sizes() << ' ' << y[0].to(torch::kFloat64).sum().item<double>() << '\n';
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
