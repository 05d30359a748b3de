# cuda.mk: nvcc and the .cu files.
#
## make cuda-check       compiles every .cu file with nvcc, of the PATH or else of PyPI; needs no GPU
##      CUDA_ARCH="80 90a 120"    GPUs to compile for

CUDA_ARCH ?= 80 90a 120
CU := $(basename $(wildcard *.cu kernels/*.cu))

ifneq ($(shell command -v nvcc),)
NVCC := nvcc
else
NVCC = $(firstword $(wildcard .venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc))
NVCC_READY := .venv/kernels
endif
# fmad: as fp-contract for the CPU. A warning or a register that is spilled to memory ends the build.
NVCCFLAGS = -std=c++20 -O3 -I. --expt-relaxed-constexpr --fmad=false -Werror all-warnings -Xptxas -warn-spills \
  $(foreach a,$(CUDA_ARCH),-gencode arch=compute_$a,code=sm_$a)

cuda-check: $(CU:%=$(OUT)/cuda/%.o)
$(OUT)/cuda/%.o: %.cu $(COMMON)/flags | $(NVCC_READY)
	@mkdir -p $(@D) && echo "  $@" >&2 && $(NVCC) $(NVCCFLAGS) $(DEFINES) -MMD -MP -c -o $@ $<

.PHONY: cuda-check
