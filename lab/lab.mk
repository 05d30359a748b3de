# lab.mk: how fast a model can be, how fast it is, and how fast beside llama.cpp and beside what the machine can do.
#
## make estimate         what a model takes, and how fast it can be; MODEL= may be a config.json alone
##      GPU=name             there instead of here (list: all that are known); ARGS= more flags: -c, --parallel, --type
## make lab              variants x caches x kernels beside the calculation: tables and pictures in lab/results/lab/
##      ROUNDS=3 MINUTES=20  it ends after these minutes at the latest, the same command goes on
##      QUICK=1              a few points once, in build/lab/quick/
## make measure          speed, beside llama.cpp (compiled here first: 10 to 20 minutes) and OpenVINO GenAI; in lab/results/
##      MEASURE="kernels speed paging variants bundled"  ROUNDS=5    what, how often; large: 1 B random weights,
##                                                           types: what int8 activations cost each weight type
## make gpu-kit          build/gpu-kit/ and .tar.gz: lab/gpu.py and all that it needs on another machine, with a GPU
##      CUDA_ARCH=90a        for an H100 or H200 alone

MEASURE ?= kernels speed paging variants bundled
ROUNDS ?= $(if $(filter lab,$(MAKECMDGOALS)),3,5)
MINUTES ?= 20

# What none of the parts in MEASURE needs is not fetched. Gemma 3 is measured where its file lies in models/.
SMOLLM2 := models/SmolLM2-135M-Instruct
MEASURED := $(if $(filter speed types paging variants,$(MEASURE)),$(SMOLLM2).Q4_1.gguf) \
  $(if $(filter speed,$(MEASURE)),$(SMOLLM2).Q8_0.gguf) \
  $(if $(filter speed types,$(MEASURE)),$(wildcard models/gemma-3-270m-q4_k_m.gguf)) \
  $(if $(filter large,$(MEASURE)),$(patsubst %,models/random-1b-%.gguf,q8_0 q4_0 q4_k))
PROGRAMS := $(addprefix $(TEST)/,$(if $(filter kernels,$(MEASURE)),matmul_bench attention_bench) \
  $(if $(filter paging,$(MEASURE)),paging_bench))
$(TEST)/%_bench: $(TEST)/lab/%_bench.o $(TEST_STAGES)
	@$(COMPILE) -o $@ $^ $(LDLIBS)

# Binaries are built by makes below Python, which does not pass on the pipe of this one's jobs.
OWN_MAKES = MAKEFLAGS='$(filter-out --jobserver%,$(MAKEFLAGS))'
measure: .venv/exporter $(PROGRAMS) $(MEASURED) $(if $(filter speed large paging,$(MEASURE)),.venv/lab)
	@for m in $(MEASURED); do $(MAKE) weights MODEL=$$m || exit 1; done
	@$(OWN_MAKES) $(PYTHON) lab/measure.py $(MEASURE) --rounds $(ROUNDS) \
	  $(if $(strip $(MEASURED)),--models $(MEASURED)) $(if $(PROGRAMS),--programs $(PROGRAMS))
weights: $(SOURCE_READY)
	@$(WEIGHTS) >/dev/null
$(SMOLLM2).Q8_0.gguf: $(SMOLLM2).Q4_1.gguf | .venv/lab
	@$(PYTHON) lab/llama_cpp_peer.py quantize $< $@

models/random-1b-%.gguf: $(SMOLLM2).Q4_1.gguf lab/random_gguf.py
	@PYTHONPATH=. $(PYTHON) lab/random_gguf.py $< $* $@

lab: .venv/tests $(SMOLLM2).Q4_1.gguf
	@$(OWN_MAKES) $(PYTHON) lab/lab.py $(if $(QUICK),--quick,--rounds $(ROUNDS) --minutes $(MINUTES))

# Programs to be carried: for any GPU and any CPU of the last ten years. Models travel as shapes, and are filled there.
CARRY := DEVICE=cuda CUDA_ARCH="$(if $(filter file,$(origin CUDA_ARCH)),$(CHECKED_ARCH),$(CUDA_ARCH))" ARCH=x86-64-v3
CARRIED_MODELS := smollm2-135m:bf16 llama-3-8b:bf16 llama-3-8b:q8_0 llama-3-8b:q4_k deepseek-v2-lite:bf16
gpu-kit: .venv/exporter
	@mkdir -p build/$@/shapes && cp lab/gpu.py lab/random_weights.py tokenizer.bin build/$@
	@git describe --always --dirty >build/$@/version
	@for m in $(CARRIED_MODELS); do $(PYTHON) export.py tests/data/configs/$${m%:*}.json --type $${m#*:} \
	  -o build/$@/shapes/$${m%:*}-$${m#*:}.safetensors >/dev/null || exit 1; done
	@for v in gqa mla; do run=$$($(MAKE) -s binary $(CARRY) ATTENTION=$$v) && strip -o build/$@/run-$$v $$run || exit 1; done
	@$(MAKE) kit-programs $(CARRY)
	@tar czf build/$@.tar.gz -C build $@
kit-programs: $(ON_A_DEVICE:%=$(TEST)/$(CUDA)/%) $(patsubst lab/%.cpp,$(TEST)/$(CUDA)/%,$(wildcard lab/*_case.cpp))
	@for program in $^; do strip -o build/gpu-kit/$${program##*/} $$program || exit 1; done
$(TEST)/$(CUDA)/%_case: $(TEST)/lab/%_case.o $(CU:%=$(TEST)/$(CUDA)/%.o) $(SHARED)
	@$(COMPILE) -o $@ $^ $(CARRIED) $(LDLIBS) $(CUDA_LIBS)
$(TEST)/%_case: $(TEST)/lab/%_case.o $(TEST_STAGES)
	@$(COMPILE) -o $@ $^ $(LDLIBS)

estimate: ARGS =
estimate: $(SOURCE_READY)
	@weights=$$($(WEIGHTS)) && $(MAKE) all >&2 && ./run "$$weights" --estimate $(if $(GPU),--gpu "$(GPU)") $(ARGS)

.PHONY: estimate lab measure weights gpu-kit kit-programs
