#include "families.h"

NB_MODULE(_native, m) {
  m.doc() = "Kernels of Open-AutoGLM Mesh.";
  autoglm::bind_device(m);
  autoglm::bind_packing(m);
  autoglm::bind_model(m);
  autoglm::bind_sampling(m);
}
