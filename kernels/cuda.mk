# cuda.mk: the GPU: whether there is one, nvcc, and what the .cu files become.
#
## make cuda-check       compiles every .cu file with nvcc, of the PATH or else of PyPI, for sm_80, 90a, 120; needs no GPU
##      CUDA_ARCH="80 90a 120"    what DEVICE=cuda compiles for: the GPU here, else these

# The GPUs here, as nvcc calls them: "90" for compute capability 9.0.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
  sed -n 's/^\([0-9]*\)\.\([0-9]\)$$/\1\2/p' | sort -u)
CHECKED_ARCH := 80 90a 120
CUDA_ARCH ?= $(or $(GPUS),$(CHECKED_ARCH))

# .venv/kernels: nvcc in .venv (kernels/requirements.txt), where the PATH has none.
NVCC = $(or $(NVCC_ON_PATH),$(firstword $(wildcard .venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)))
NVCC_ON_PATH := $(realpath $(shell command -v nvcc))
NVCC_READY := $(if $(NVCC_ON_PATH),,.venv/kernels)

DEVICE ?= $(if $(and $(GPUS),$(NVCC)),cuda,cpu)

# The stages that have a .cu; attention.cu is naive and flash.
CU := $(basename $(wildcard *.cu kernels/*.cu cli/*.cu))
ifeq ($(DEVICE)-$(KERNEL)-$(KV),cuda-flash-f32)
$(error KV=f32 with KERNEL=flash: tensor cores multiply 16 bits: KV=f16, bf16 or q8, or KERNEL=naive, or DEVICE=cpu)
endif
ifeq ($(DEVICE)-$(KV),cuda-q4)
$(error KV=q4: the CPU alone keeps 4 bits: KV=q8, or DEVICE=cpu)
endif
CUDA :=  # the folder of what is compiled for these GPUs
ifeq ($(DEVICE),cuda)
CUDA := cuda$(subst $() $(),-,$(strip $(CUDA_ARCH)))
REPLACED := $(CU) unit/cpu kernels/flash
# The cache's own type is in these; the rest serves every choice.
CU_OF_CACHE := attention kvcache
CU_CACHE := build/$(CUDA)/$(KV)-$(CACHE)$(if $(filter paged,$(CACHE)),$(BLOCK))
CU_OBJECTS := $(patsubst %,build/$(CUDA)/%.o,$(filter-out $(CU_OF_CACHE),$(CU))) $(CU_OF_CACHE:%=$(CU_CACHE)/%.o)
# All libraries but the C one are linked statically: the binary runs wherever there is a driver.
TOOLKIT = $(abspath $(dir $(NVCC))..)
CARRIED := -static-libstdc++ -static-libgcc -Wl,-Bstatic
CUDA_LIBS = -ltinfo -lbsd -lmd $(addprefix -L,$(wildcard $(TOOLKIT)/lib64 $(TOOLKIT)/lib $(TOOLKIT)/targets/*/lib)) \
  -lcudart_static -Wl,-Bdynamic -lrt -ldl
endif

# fmad: as fp-contract for the CPU. A warning or a register that is spilled to memory ends the build.
NVCCFLAGS := -std=c++20 -O3 -I. --expt-relaxed-constexpr --fmad=false -Werror all-warnings -Xptxas -warn-spills
# $(call nvcc,ARCHITECTURES,DEFINES)
nvcc = @mkdir -p $(@D) && echo "  $@" >&2 && $(NVCC) $(NVCCFLAGS) \
  $(foreach a,$1,-gencode arch=compute_$a,code=sm_$a) $2 -MMD -MP -c -o $@ $<
build/$(CUDA)/%.o: %.cu | packages $(NVCC_READY) ; $(call nvcc,$(CUDA_ARCH))
$(CU_CACHE)/%.o: %.cu | packages $(NVCC_READY) ; $(call nvcc,$(CUDA_ARCH),$(DEFINES))

cuda-check: $(patsubst %,build/cuda-check/%.o,$(CU) tests/mma_rows)
build/cuda-check/%.o: %.cu | packages $(NVCC_READY) ; $(call nvcc,$(CHECKED_ARCH),$(DEFINES))

.PHONY: cuda-check
