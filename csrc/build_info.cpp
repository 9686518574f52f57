// What was built, for which architectures and with which switches. pybind11 cannot keep to torch's or Python's stable
// ABI, so it lives in this module of its own.

#include <pybind11/pybind11.h>

#include "build_info.h"

namespace py = pybind11;

namespace {

// "a;b;c" as a tuple of strings.
py::tuple split(const char* list) {
  py::list items;
  if (*list != '\0') items = py::str(list).attr("split")(";").cast<py::list>();
  return py::tuple(items);
}

py::dict build_info() {
  py::list architectures;
  for (py::handle name : split(FASTXAI_CUDA_ARCHITECTURES)) {
    architectures.append(py::int_(py::str(name).attr("partition")("-").attr("__getitem__")(0)));
  }
  py::dict info;
  info["version"] = FASTXAI_VERSION;
  info["build_type"] = FASTXAI_BUILD_TYPE;
  info["compiler"] = FASTXAI_COMPILER;
  info["cpu_instruction_sets"] = split(FASTXAI_CPU_INSTRUCTION_SETS);
  info["cuda_architectures"] = py::tuple(architectures);
  info["cuda_compiler"] = FASTXAI_CUDA_COMPILER;
  info["stable_abi"] = FASTXAI_STABLE_ABI;
  info["built_with_torch"] = FASTXAI_TORCH_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "What the native library was built from.";
  m.def("build_info", &build_info, "Build description as a dict.");
}
