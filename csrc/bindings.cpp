// segkernels._C: all native functions. The only file that includes pybind11.
//
// The arguments are tensors, sizes and a stream, which Python has checked. Functions release the
// GIL while they compute.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <string.h>

#include <array>
#include <chrono>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "build_config.h"
#include "common/status.h"
#include "dense_crf/features.h"
#include "dense_crf/mean_field.h"
#include "dense_crf/product.h"
#include "dilated_conv2d/weight_gradient.h"
#include "gaussian_filter/gaussian_filter.h"
#include "gaussian_filter/order.h"
#include "interpolate/interpolate.h"
#include "permutohedral/permutohedral.h"
#include "pooling/max_pool2d.h"
#include "pooling/max_unpool2d.h"
#include "pooling/unpool2d.h"
#include "upsample_argmax/upsample_argmax.h"
#include "upsample_cross_entropy/upsample_cross_entropy.h"

namespace py = pybind11;

namespace {

using segkernels::BuildBuffers;
using segkernels::FilterBuffers;
using segkernels::Grid;
using segkernels::Lattice;
using segkernels::MeanField;
using segkernels::MeanFieldTerm;
using segkernels::Resampling;
using segkernels::ScalarType;
using segkernels::Strided;
using segkernels::Where;

// The address of a tensor's data, null for None; converts to any pointer. pybind holds the
// arguments until a call returns, so the data outlive the kernel's launch.
struct Address {
  void* data = nullptr;

  template <class T>
  operator T*() const {
    return static_cast<T*>(data);
  }
};

}  // namespace

template <>
struct py::detail::type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("Tensor | None"));

  bool load(handle source, bool) {
    PyObject* const tensor = source.ptr();
    if (source.is_none()) return true;
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    const auto data = reinterpret_steal<object>(PyObject_CallMethodNoArgs(tensor, name));
    if (!data && PyErr_ExceptionMatches(PyExc_AttributeError) != 0) {
      PyErr_Clear();
      return false;
    }
    if (data) value.data = PyLong_AsVoidPtr(data.ptr());
    if (PyErr_Occurred() != nullptr) throw error_already_set();
    if (value.data == nullptr && source.attr("numel")().cast<int64_t>() != 0)
      throw std::runtime_error("a tensor has values but no memory");
    return true;
  }
};

namespace {

// As py::gil_scoped_release. While Python exits, PyEval_RestoreThread ends other threads by
// unwinding their stacks, before Python 3.14. That would destroy Python objects without the GIL, so
// such a thread sleeps until the process has ended.
struct ReleaseGil {
  ReleaseGil() = default;
  ReleaseGil(const ReleaseGil&) = delete;
  ~ReleaseGil() {
    try {
      PyEval_RestoreThread(state);
    } catch (...) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }

  PyThreadState* state = PyEval_SaveThread();
};

using WhereTuple = std::tuple<int, uintptr_t, int>;  // from _native.where()

Where where_of(const WhereTuple& w) {
  return {std::get<0>(w), reinterpret_cast<void*>(std::get<1>(w)), std::get<2>(w)};
}

// A struct's pointer as a property: reads as an integer, takes a tensor, which it keeps alive. The
// offset in place of the member's type saves compiling the property once per type.
template <class S>
void pointer_at(py::class_<S>& c, const char* name, ptrdiff_t offset) {
  c.def_property(
      name,
      [offset](const S& s) {
        uintptr_t address;
        memcpy(&address, reinterpret_cast<const char*>(&s) + offset, sizeof address);
        return address;
      },
      py::cpp_function(
          [offset](S& s, Address p) {
            memcpy(reinterpret_cast<char*>(&s) + offset, &p.data, sizeof p.data);
          },
          py::keep_alive<1, 2>()));
}

template <class S, class P>
void pointer(py::class_<S>& c, const char* name, P* S::* member) {
  const S s{};
  pointer_at(c, name,
             reinterpret_cast<const char*>(&(s.*member)) - reinterpret_cast<const char*>(&s));
}

// A CUDA function, or null in builds without CUDA.
#if defined(SK_WITH_CUDA)
#define SK_CUDA(function) (&segkernels::function)
#else
#define SK_CUDA(function) nullptr
#endif

template <class F>
struct Identity {
  using type = F;
};

// The function for a device, which is negative for the CPU.
template <class F>
F* on_device(int device, F* cpu, typename Identity<F>::type* cuda) {
  F* const function = device < 0 ? cpu : cuda;
  if (function == nullptr) throw std::runtime_error("segkernels was built without CUDA");
  return function;
}

template <class F>
F* on_device(const WhereTuple& w, F* cpu, typename Identity<F>::type* cuda) {
  return on_device(std::get<0>(w), cpu, cuda);
}

const segkernels::PermutohedralApi& permutohedral(const WhereTuple& w) {
  return on_device(w, &segkernels::permutohedral_cpu, SK_CUDA(permutohedral_cuda))();
}

void run_mean_field(const WhereTuple& w, const MeanField& m, bool is_double) {
  on_device(w, &segkernels::mean_field_cpu, SK_CUDA(mean_field_cuda))(where_of(w), m, is_double);
}

// (features, low, high, points) of the queries and of the keys. `a` is None for the filter itself.
using PointsTuple = std::tuple<Address, Address, Address, int64_t>;

segkernels::GaussianPoints points_of(const PointsTuple& p) {
  return {std::get<0>(p), std::get<1>(p), std::get<2>(p), std::get<3>(p)};
}

void run_gaussian_filter(const WhereTuple& w, const PointsTuple& queries, const PointsTuple& keys,
                         int64_t batch, int dims, int channels, double reach, Address a, Address b,
                         Address out, bool is_double) {
  const segkernels::GaussianFilter f{
      points_of(queries), points_of(keys), batch, dims, channels, reach, a, b, out};
  segkernels::gaussian_filter_cpu(where_of(w), f, is_double);
}

// `sizes`: batch, channels, points, padded points; `strides`: of points and channels in the plan's
// order.
template <void (*kFunction)(const Where&, const segkernels::OrderedValues&, bool)>
void run_order(const WhereTuple& w, std::array<int64_t, 4> sizes, std::array<int64_t, 2> strides,
               Address index, Address invalid, Address not_finite, Address from, Address to,
               std::optional<double> least_sum, bool is_double) {
  kFunction(where_of(w),
            {sizes[0], sizes[1], sizes[2], sizes[3], strides[0], strides[1], index, invalid,
             not_finite, from, to, least_sum.has_value(), least_sum.value_or(0)},
            is_double);
}

void run_product(const WhereTuple& w, Address a, int64_t a_row, int64_t a_inner, Address b,
                 Address out, int64_t rows, int64_t inner, int64_t cols, bool is_double) {
  segkernels::product_cpu(where_of(w), {a, a_row, a_inner, b, out, rows, inner, cols}, is_double);
}

void run_grid_features(const WhereTuple& w, int64_t batch, const std::vector<int64_t>& size,
                       Address sxy, Address image, int image_type,
                       const std::vector<int64_t>& strides, int channels, Address srgb, Address out,
                       bool is_double) {
  segkernels::GridFeatures f{};
  f.batch = batch;
  f.axes = int32_t(size.size());
  for (size_t i = 0; i < size.size(); ++i) f.size[i] = size[i];
  f.sxy = sxy;
  f.image = image;
  f.image_type = image_type;
  f.channels = channels;
  for (size_t i = 0; i < strides.size(); ++i) f.stride[i] = strides[i];
  f.srgb = srgb;
  f.out = out;
  segkernels::grid_features_cpu(where_of(w), f, is_double);
}

uintptr_t status_words(int device) {
  const auto words = on_device<int32_t*(int)>(device, nullptr, SK_CUDA(status_words));
  return reinterpret_cast<uintptr_t>(words(device));
}

int64_t permutohedral_workspace(int device, int64_t entries, int64_t tiles, int64_t pairs) {
  const auto bytes = on_device<int64_t(int, int64_t, int64_t, int64_t)>(
      device, nullptr, SK_CUDA(permutohedral_workspace));
  return bytes(device, entries, tiles, pairs);
}

void bind_permutohedral(py::module_& m) {
  using Release = py::call_guard<ReleaseGil>;
  m.attr("max_dims") = segkernels::kMaxDims;
  m.attr("longest_pair") = segkernels::kLongestPair;
  m.def("record_size", &segkernels::record_size, "int32 words of a point's record");

  py::class_<Grid>(m, "Grid")
      .def(py::init([](int batch, int height, int width, int tile_height, int tile_width) {
        return Grid{batch, height, width, tile_height, tile_width};
      }))
      .def_readonly("batch", &Grid::batch)
      .def_property_readonly("tile_points", &segkernels::tile_points)
      .def_property_readonly("tiles", &segkernels::tile_count)
      .def_property_readonly("positions", &segkernels::position_count);

  py::class_<Lattice> lattice(m, "Lattice");
  lattice.def(py::init<>())
      .def_readwrite("grid", &Lattice::grid)
      .def_readwrite("dims", &Lattice::dims)
      .def_readwrite("vertex_bound", &Lattice::vertex_bound)
      .def_readwrite("pair_bound", &Lattice::pair_bound);
  pointer(lattice, "weights", &Lattice::weights);
  pointer(lattice, "local_ids", &Lattice::local_ids);
  pointer(lattice, "pair_vertex", &Lattice::pair_vertex);
  pointer(lattice, "tile_start", &Lattice::tile_start);
  pointer(lattice, "vertex_start", &Lattice::vertex_start);
  pointer(lattice, "vertex_pairs", &Lattice::vertex_pairs);
  pointer(lattice, "neighbours", &Lattice::neighbours);
  pointer(lattice, "counts", &Lattice::counts);
  pointer(lattice, "order", &Lattice::order);
  pointer(lattice, "order_weights", &Lattice::order_weights);
  pointer(lattice, "pair_range", &Lattice::pair_range);

  py::class_<BuildBuffers> build(m, "BuildBuffers");
  build.def(py::init<>())
      .def_readwrite("capacity", &BuildBuffers::capacity)
      .def_readwrite("tile_capacity", &BuildBuffers::tile_capacity)
      .def_readwrite("temporary_bytes", &BuildBuffers::temporary_bytes);
  pointer(build, "features", &BuildBuffers::features);
  pointer(build, "records", &BuildBuffers::records);
  pointer(build, "slots", &BuildBuffers::slots);
  pointer(build, "slot_of", &BuildBuffers::slot_of);
  pointer(build, "vertex_of_slot", &BuildBuffers::vertex_of_slot);
  pointer(build, "rank_of", &BuildBuffers::rank_of);
  pointer(build, "first_entry", &BuildBuffers::first_entry);
  pointer(build, "tile_slots", &BuildBuffers::tile_slots);
  pointer(build, "tile_keys", &BuildBuffers::tile_keys);
  pointer(build, "image_start", &BuildBuffers::image_start);
  pointer(build, "temporary", &BuildBuffers::temporary);
  pointer(build, "sort_keys", &BuildBuffers::sort_keys);
  pointer(build, "sort_values", &BuildBuffers::sort_values);
  pointer(build, "status", &BuildBuffers::status);

  m.def("lattice_workspace", &permutohedral_workspace);
  m.def(
      "lattice_embed",
      [](const WhereTuple& w, const Lattice& l, const BuildBuffers& b, bool is_double) {
        permutohedral(w).embed(where_of(w), l, b, is_double);
      },
      Release());
  m.def(
      "lattice_tiles",
      [](const WhereTuple& w, const Lattice& l, const BuildBuffers& b, bool is_double) {
        permutohedral(w).tiles(where_of(w), l, b, is_double);
      },
      Release());
  m.def(
      "lattice_link",
      [](const WhereTuple& w, const Lattice& l, const BuildBuffers& b) {
        permutohedral(w).link(where_of(w), l, b);
      },
      Release());
  m.def(
      "lattice_embed_grad",
      [](const WhereTuple& w, const Lattice& l, Address features, Address grad_weights,
         Address grad_features, bool is_double) {
        permutohedral(w).embed_grad(where_of(w), l, features, grad_weights, grad_features,
                                    is_double);
      },
      Release());
  m.def(
      "rows_pack",
      [](const WhereTuple& w, const Grid& grid, Address source, int64_t batch, int64_t channel,
         int64_t point, Address rows, int channels, int width, int kind, Address status,
         bool is_double) {
        permutohedral(w).pack(where_of(w), grid, Strided{source, batch, channel, point}, rows,
                              channels, width, segkernels::RowKind(kind), status, is_double);
      },
      Release());
  m.def(
      "rows_unpack",
      [](const WhereTuple& w, const Grid& grid, Address rows, Address target, int64_t batch,
         int64_t channel, int64_t point, int channels, int width, bool is_double) {
        permutohedral(w).unpack(where_of(w), grid, rows, Strided{target, batch, channel, point},
                                channels, width, is_double);
      },
      Release());
  m.def(
      "lattice_splat",
      [](const WhereTuple& w, const Lattice& l, Address rows, Address scale_in, Address pairs,
         Address vertices, Address scratch, int width, bool reverse, bool is_double) {
        const FilterBuffers b{rows, scale_in, pairs, vertices, scratch, width, reverse};
        permutohedral(w).splat(where_of(w), l, b, is_double);
      },
      Release());
  m.def(
      "lattice_slice",
      [](const WhereTuple& w, const Lattice& l, Address vertices, Address scale, double skipped,
         Address rows, int width, bool is_double) {
        permutohedral(w).slice(where_of(w), l, vertices, scale, skipped, rows, width, is_double);
      },
      Release());
  m.def(
      "lattice_weights_grad",
      [](const WhereTuple& w, const Lattice& l, Address x, Address g, Address vertices,
         Address grad_vertices, Address grad_weights, int width, bool is_double) {
        permutohedral(w).weights_grad(where_of(w), l, x, g, vertices, grad_vertices, grad_weights,
                                      width, is_double);
      },
      Release());
  m.def(
      "rows_invert_norm",
      [](const WhereTuple& w, int64_t positions, Address norm, Address out, bool root,
         bool is_double) {
        permutohedral(w).invert_norm(where_of(w), positions, norm, out, root, is_double);
      },
      Release());
}

void bind_dense_crf(py::module_& m) {
  m.attr("max_terms") = segkernels::kMaxTerms;

  py::class_<MeanFieldTerm> term(m, "MeanFieldTerm");
  term.def(py::init<>())
      .def_property(
          "lattice", [](MeanFieldTerm& t) -> Lattice& { return t.lattice; },
          py::cpp_function([](MeanFieldTerm& t, const Lattice& l) { t.lattice = l; },
                           py::keep_alive<1, 2>()))
      .def_readwrite("compat_is_matrix", &MeanFieldTerm::compat_is_matrix);
  pointer(term, "scale_in", &MeanFieldTerm::scale_in);
  pointer(term, "scale_out", &MeanFieldTerm::scale_out);
  pointer(term, "compat", &MeanFieldTerm::compat);
  pointer(term, "splat_weights", &MeanFieldTerm::splat_weights);
  pointer(term, "pairs", &MeanFieldTerm::pairs);
  pointer(term, "vertices", &MeanFieldTerm::vertices);
  pointer(term, "scratch", &MeanFieldTerm::scratch);

  py::class_<MeanField> field(m, "MeanField");
  field.def(py::init<>())
      .def_readwrite("grid", &MeanField::grid)
      .def_readwrite("channels", &MeanField::channels)
      .def_readwrite("width", &MeanField::width)
      .def_readwrite("iterations", &MeanField::iterations)
      .def_readwrite("log", &MeanField::log)
      .def(
          "set_terms",
          [](MeanField& f, const std::vector<MeanFieldTerm>& terms) {
            if (terms.size() > segkernels::kMaxTerms)
              throw std::runtime_error("too many pairwise terms");
            f.term_count = int32_t(terms.size());
            for (size_t i = 0; i < terms.size(); ++i) f.terms[i] = terms[i];
          },
          py::keep_alive<1, 2>());
  pointer(field, "energy", &MeanField::energy);
  pointer(field, "rows", &MeanField::rows);
  pointer(field, "scratch", &MeanField::scratch);
  pointer(field, "status", &MeanField::status);

  m.def("mean_field", &run_mean_field, py::call_guard<ReleaseGil>());
  m.def("gaussian_filter", &run_gaussian_filter, py::call_guard<ReleaseGil>());
  m.def("gaussian_sort", &run_order<segkernels::sort_values_cpu>, py::call_guard<ReleaseGil>());
  m.def("gaussian_unsort", &run_order<segkernels::unsort_values_cpu>, py::call_guard<ReleaseGil>());
  m.def("product", &run_product, py::call_guard<ReleaseGil>());
  m.def("grid_features", &run_grid_features, py::call_guard<ReleaseGil>());
}

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
  info["simd"] = words(build::kSimd);
  return info;
}

// Arrays hold (height, width).
Resampling make_resampling(int64_t planes, int64_t inner, std::array<int64_t, 2> in,
                           std::array<int64_t, 2> out, std::array<double, 2> factors, int mode,
                           bool align_corners, int rule) {
  return {planes,
          inner,
          in[0],
          in[1],
          out[0],
          out[1],
          factors[0],
          factors[1],
          segkernels::Mode(mode),
          align_corners,
          segkernels::Rule(rule)};
}

void interpolate(const WhereTuple& w, const Resampling& r, int type, Address from, Address to,
                 bool backward) {
  const auto function =
      backward
          ? on_device(w, &segkernels::interpolate_backward_cpu, SK_CUDA(interpolate_backward_cuda))
          : on_device(w, &segkernels::interpolate_cpu, SK_CUDA(interpolate_cuda));
  function(where_of(w), r, ScalarType(type), from, to);
}

using StridesArgs = std::tuple<int64_t, int64_t, int64_t, int64_t>;

segkernels::Strides strides_of(const StridesArgs& s) {
  return {std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s)};
}

segkernels::ArgmaxCall argmax_call(const Resampling& r, int classes, const StridesArgs& strides,
                                   int type, int label_type, Address logits, Address labels,
                                   Address confidence) {
  return {r,      classes, strides_of(strides), ScalarType(type), segkernels::LabelType(label_type),
          logits, labels,  confidence};
}

int64_t upsample_argmax_workspace(const WhereTuple& where, const segkernels::ArgmaxCall& call) {
  return segkernels::upsample_argmax_workspace(where_of(where), call);
}

void upsample_argmax(const WhereTuple& w, const segkernels::ArgmaxCall& call, Address workspace) {
  on_device(w, &segkernels::upsample_argmax_cpu, SK_CUDA(upsample_argmax_cuda))(where_of(w), call,
                                                                                workspace);
}

segkernels::LossCall loss_call(const Resampling& r, int classes, const StridesArgs& strides,
                               int type, bool binary, Address logits, Address target,
                               int target_type, int64_t ignore_index, Address weight,
                               Address pos_weight, double smoothing, int reduction,
                               Address status) {
  return {r,
          classes,
          strides_of(strides),
          ScalarType(type),
          binary,
          logits,
          target,
          segkernels::TargetType(target_type),
          ignore_index,
          weight,
          pos_weight,
          smoothing,
          segkernels::Reduction(reduction),
          status};
}

int64_t upsample_loss_workspace(const WhereTuple& where, const segkernels::LossCall& call,
                                bool backward) {
  return segkernels::upsample_loss_workspace(where_of(where), call, backward);
}

void upsample_loss(const WhereTuple& w, const segkernels::LossCall& call, Address kept,
                   Address losses, Address totals, Address workspace) {
  on_device(w, &segkernels::upsample_loss_cpu, SK_CUDA(upsample_loss_cuda))(
      where_of(w), call, {kept, losses, totals, workspace});
}

void upsample_loss_backward(const WhereTuple& w, const segkernels::LossCall& call, Address grad,
                            Address kept, Address totals, Address grad_logits,
                            const StridesArgs& strides, Address workspace) {
  on_device(w, &segkernels::upsample_loss_backward_cpu, SK_CUDA(upsample_loss_backward_cuda))(
      where_of(w), call, {grad, kept, totals, grad_logits, strides_of(strides), workspace});
}

void bind_interpolate(py::module_& m) {
  const auto nogil = py::call_guard<ReleaseGil>();
  py::class_<Resampling>(m, "Resampling").def(py::init(&make_resampling));
  m.def("interpolate", &interpolate, nogil,
        "Forward, or backward with the gradients in the two places.");
}

void bind_upsample_argmax(py::module_& m) {
  const auto nogil = py::call_guard<ReleaseGil>();
  py::class_<segkernels::ArgmaxCall>(m, "ArgmaxCall")
      .def(py::init(&argmax_call), py::keep_alive<1, 7>(), py::keep_alive<1, 8>(),
           py::keep_alive<1, 9>());
  m.def("upsample_argmax_workspace", &upsample_argmax_workspace,
        "Bytes that upsample_argmax needs on the CPU.");
  m.def("upsample_argmax", &upsample_argmax, nogil);
}

void bind_upsample_cross_entropy(py::module_& m) {
  const auto nogil = py::call_guard<ReleaseGil>();
  py::class_<segkernels::LossCall>(m, "LossCall")
      .def(py::init(&loss_call), py::keep_alive<1, 7>(), py::keep_alive<1, 8>(),
           py::keep_alive<1, 11>(), py::keep_alive<1, 12>(), py::keep_alive<1, 15>());
  m.attr("LOSS_PARTIALS") = 2 * segkernels::kMaxPartials;
  m.def("upsample_loss_workspace", &upsample_loss_workspace,
        "Bytes that the losses need on the CPU.");
  m.def("upsample_loss", &upsample_loss, nogil);
  m.def("upsample_loss_backward", &upsample_loss_backward, nogil);
}

namespace pooling = segkernels::pooling;

pooling::MaxPool2dApi max_pool2d(const WhereTuple& w) {
  return on_device(w, &pooling::max_pool2d_cpu, SK_CUDA(pooling::max_pool2d_cuda))();
}

pooling::MaxUnpool2dApi max_unpool2d(const WhereTuple& w) {
  return on_device(w, &pooling::max_unpool2d_cpu, SK_CUDA(pooling::max_unpool2d_cuda))();
}

pooling::Unpool2dApi unpool2d(const WhereTuple& w) {
  return on_device(w, &pooling::unpool2d_cpu, SK_CUDA(pooling::unpool2d_cuda))();
}

using HeightWidth = std::array<int32_t, 2>;

pooling::Windows make_windows(int64_t planes, int64_t channels, HeightWidth full,
                              HeightWidth pooled, HeightWidth kernel, HeightWidth stride,
                              HeightWidth padding, HeightWidth dilation) {
  return {planes,
          channels,
          {full[0], full[1]},
          {pooled[0], pooled[1]},
          {kernel[0], kernel[1]},
          {stride[0], stride[1]},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]}};
}

pooling::UnpoolBuffers unpool_buffers(int type, Address input, Address positions, bool wide,
                                      Address output, Address winners, Address status) {
  return {input, positions, output, winners, status, wide, segkernels::ScalarType(type)};
}

// Returns the status words on the CPU if one is set; on CUDA they are written to `status`.
std::vector<int32_t> unpool(const WhereTuple& w, const pooling::Windows& windows, int type,
                            Address input, Address positions, bool wide, Address output,
                            Address winners, Address status) {
  std::array<int32_t, segkernels::kStatusCodes> words{};
  auto buffers = unpool_buffers(type, input, positions, wide, output, winners, status);
  if (std::get<0>(w) < 0) buffers.status = words.data();
  max_unpool2d(w).forward(where_of(w), windows, buffers);
  bool any = false;
  for (const int32_t word : words) any |= word != 0;
  return any ? std::vector<int32_t>(words.begin(), words.end()) : std::vector<int32_t>();
}

void bind_pooling(py::module_& m) {
  using pooling::Windows;
  using Release = py::call_guard<ReleaseGil>;
  py::class_<Windows>(m, "Windows").def(py::init(&make_windows));
  m.def(
      "max_pool2d",
      [](const WhereTuple& w, const Windows& windows, int type, Address input, Address values,
         Address codes, Address indices) {
        max_pool2d(w).forward(where_of(w), windows,
                              {input, values, codes, indices, ScalarType(type)});
      },
      Release());
  m.def(
      "max_pool2d_backward",
      [](const WhereTuple& w, const Windows& windows, int type, Address grad, Address positions,
         bool wide, Address grad_input, Address sums) {
        max_pool2d(w).backward(where_of(w), windows,
                               {grad, positions, grad_input, sums, wide, ScalarType(type)});
      },
      Release());
  m.def("max_unpool2d", &unpool, Release());
  m.def(
      "max_unpool2d_backward",
      [](const WhereTuple& w, const Windows& windows, int type, Address grad, Address positions,
         bool wide, Address grad_input, Address status) {
        max_unpool2d(w).backward(
            where_of(w), windows,
            unpool_buffers(type, grad, positions, wide, grad_input, {}, status));
      },
      Release());
  m.def(
      "unpool_nearest",
      [](const WhereTuple& w, const Windows& windows, int type, Address input, Address output) {
        unpool2d(w).nearest(where_of(w), windows, {input, output, ScalarType(type)});
      },
      Release());
  m.def(
      "unpool_nearest_backward",
      [](const WhereTuple& w, const Windows& windows, int type, Address grad, Address grad_input) {
        unpool2d(w).nearest_backward(where_of(w), windows, {grad, grad_input, ScalarType(type)});
      },
      Release());
  m.def(
      "unpool_bed_of_nails",
      [](const WhereTuple& w, const Windows& windows, int type, Address input, Address output,
         int cell) {
        unpool2d(w).bed_of_nails(where_of(w), windows, {input, output, ScalarType(type)}, cell);
      },
      Release());
}

[[noreturn]] [[maybe_unused]] void without_sm90a() {
  throw std::runtime_error("segkernels was built without sm_90a");
}

// (kernel, dilation, padding, output channels)
using BranchTuple = std::tuple<std::array<int, 2>, std::array<int, 2>, std::array<int, 2>, int64_t>;

// The fields of a schedule. The kernel reads "table": starts, segments and fix-ups, as int32 words.
py::dict found_schedule(const segkernels::dilated::Schedule& s) {
  std::string table;
  const auto append = [&table](const auto& items) {
    table.append(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(items[0]));
  };
  append(s.start);
  append(s.segments);
  append(s.fixups);
  py::dict found;
  found["box"] = s.box;
  found["boxes"] = s.boxes;
  found["tile_channels"] = s.tile_channels;
  found["cluster"] = s.cluster;
  found["workers"] = s.workers;
  found["segments"] = s.segments.size();
  found["fixups"] = s.fixups.size();
  found["table"] = py::bytes(table);
  found["workspace_tiles"] = s.workspace_tiles;
  found["tile_steps"] = s.tile_steps;
  found["max_load"] = s.max_load;
  return found;
}

py::dict dilated_conv2d_schedule(int64_t batch, std::array<int64_t, 2> in,
                                 std::array<int64_t, 2> out, int64_t channel_steps,
                                 const std::vector<BranchTuple>& branches, int multiprocessors,
                                 int tile_channels, int cluster, std::array<int, 3> box) {
  namespace dilated = segkernels::dilated;
  dilated::Shape shape{batch, in, out, channel_steps, {}};
  for (const auto& [kernel, dilation, padding, out_channels] : branches) {
    shape.branches.push_back({kernel, dilation, padding, out_channels});
  }
  return found_schedule(
      dilated::make_schedule(shape, multiprocessors, tile_channels, cluster, box));
}

py::dict dilated_conv2d_weight_schedule(int64_t batch, std::array<int64_t, 2> in,
                                        std::array<int64_t, 2> out, int64_t channels,
                                        const BranchTuple& branch, int multiprocessors) {
  namespace dilated = segkernels::dilated;
  const auto& [kernel, dilation, padding, out_channels] = branch;
  const dilated::Shape shape{batch, in, out, 1, {{kernel, dilation, padding, out_channels}}};
  return found_schedule(dilated::make_weight_schedule(shape, channels, multiprocessors));
}

// Reads numbers, addresses and sizes of a call by name.
struct Arguments {
  const py::dict& all;

  int64_t number(const char* name) const { return all[name].cast<int64_t>(); }
  Address address(const char* name) const { return all[name].cast<Address>(); }
  template <class T, size_t kCount>
  void sizes(const char* name, T (&to)[kCount]) const {
    const auto values = all[name].cast<std::array<int64_t, kCount>>();
    for (size_t i = 0; i < kCount; ++i) to[i] = T(values[i]);
  }
  template <class Call>
  void schedule(Call& c) const {
    sizes("box", c.box);
    c.tile_channels = int32_t(number("tile_channels"));
    c.workers = int32_t(number("workers"));
    c.segment_count = number("segments");
    c.fixup_count = number("fixups");
    c.start = address("table");
    c.segments = reinterpret_cast<const segkernels::dilated::Segment*>(c.start + c.workers + 1);
    c.fixups = reinterpret_cast<const segkernels::dilated::Fixup*>(c.segments + c.segment_count);
    c.workspace = address("workspace");
  }
};

// (weight, kernel, dilation, padding, output channels, offset)
using ConvBranchTuple = std::tuple<Address, std::array<int, 2>, std::array<int, 2>,
                                   std::array<int, 2>, int64_t, int64_t>;

void dilated_conv2d([[maybe_unused]] const WhereTuple& w, const py::dict& arguments) {
  namespace dilated = segkernels::dilated;
  const Arguments a{arguments};
  dilated::ConvCall c{};
  c.type = ScalarType(a.number("type"));
  c.input = a.address("input");
  c.batch = a.number("batch");
  a.sizes("in_size", c.in);
  c.channels = a.number("channels");
  a.sizes("out_size", c.out);
  c.out_channels = a.number("out_channels");
  c.output = a.address("output");
  c.out_pitch = a.number("out_pitch");
  c.residual = a.address("residual");
  c.scale = a.address("scale");
  c.shift = a.address("shift");
  c.relu = a.number("relu") != 0;
  c.aligned = a.number("pairs") != 0;
  a.schedule(c);
  a.sizes("boxes", c.boxes);
  c.cluster = int32_t(a.number("cluster"));
  for (const auto& [weight, kernel, dilation, padding, out_channels, offset] :
       arguments["branches"].cast<std::vector<ConvBranchTuple>>()) {
    if (c.branches == dilated::kMaxBranches) throw std::invalid_argument("too many branches");
    dilated::ConvBranch& b = c.branch[c.branches++];
    b.weight = weight;
    for (int i = 0; i < 2; ++i) {
      b.kernel[i] = kernel[i], b.dilation[i] = dilation[i], b.padding[i] = padding[i];
    }
    b.out_channels = out_channels;
    b.offset = offset;
  }
  const py::gil_scoped_release release;
#if defined(SK_HAVE_SM90A)
  dilated::dilated_conv2d_sm90(where_of(w), c);
#else
  without_sm90a();
#endif
}

void dilated_conv2d_weight([[maybe_unused]] const WhereTuple& w, const py::dict& arguments) {
  namespace dilated = segkernels::dilated;
  const Arguments a{arguments};
  dilated::WeightCall c{};
  c.type = ScalarType(a.number("type"));
  c.grad = a.address("grad");
  c.input = a.address("input");
  c.batch = a.number("batch");
  a.sizes("in_size", c.in);
  c.channels = a.number("channels");
  a.sizes("out_size", c.out);
  c.out_channels = a.number("out_channels");
  c.output = a.address("output");
  a.sizes("kernel", c.kernel);
  a.sizes("dilation", c.dilation);
  a.sizes("padding", c.padding);
  a.schedule(c);
  int32_t boxes[3];
  a.sizes("boxes", boxes);
  c.image_boxes = boxes[0];
  const py::gil_scoped_release release;
#if defined(SK_HAVE_SM90A)
  dilated::weight_gradient_sm90(where_of(w), c);
#else
  without_sm90a();
#endif
}

void bind_dilated_conv2d(py::module_& m) {
#if defined(SK_HAVE_SM90A)
  m.attr("has_sm90a") = true;
#else
  m.attr("has_sm90a") = false;
#endif
  m.def("dilated_conv2d", &dilated_conv2d);
  m.def("dilated_conv2d_weight", &dilated_conv2d_weight);
  m.def("dilated_conv2d_weight_schedule", &dilated_conv2d_weight_schedule);
  m.def("dilated_conv2d_schedule", &dilated_conv2d_schedule, py::arg("batch"), py::arg("in_size"),
        py::arg("out_size"), py::arg("channel_steps"), py::arg("branches"),
        py::arg("multiprocessors"), py::arg("tile_channels") = 0, py::arg("cluster") = 0,
        py::arg("box") = std::array<int, 3>{0, 0, 0});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native code of segkernels. Call the Python package, which checks arguments.";
  m.def("build_info", &build_info, "What this module was built with.");
  m.attr("status_codes") = int(segkernels::kStatusCodes);
  m.def("status_words", &status_words, "Address of the words of a CUDA device.");
  bind_permutohedral(m);
  bind_dense_crf(m);
  bind_dilated_conv2d(m);
  bind_interpolate(m);
  bind_upsample_argmax(m);
  bind_upsample_cross_entropy(m);
  bind_pooling(m);
}
