// segkernels._C: every native function on one page. The only file that includes pybind11.
//
// Functions take raw pointers (tensor.data_ptr()), sizes and a stream; Python has checked them and
// keeps the tensors alive. They release the GIL while they compute.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "build_config.h"

namespace py = pybind11;

namespace {

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> out;
  for (std::string word; stream >> word;) out.push_back(word);
  return out;
}

std::optional<std::string> some(const std::string& text) {
  return text.empty() ? std::nullopt : std::optional<std::string>(text);
}

py::dict build_info() {
  namespace build = segkernels::build;
  py::dict info;
  info["version"] = build::kVersion;
  info["compiler"] = build::kCompiler;
  info["cuda"] = some(build::kCuda);
  info["cuda_missing"] = some(build::kCudaMissing);
  info["arches"] = words(build::kArches);
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["simd"] = words(build::kSimd);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native code of segkernels. Call the Python package, which checks arguments.";
  m.def("build_info", &build_info, "What this module was built with.");
}
