# lab.mk: how fast a model can be, how fast it is, and how fast beside llama.cpp and beside what the machine can do.
#
## make estimate         what a model takes, and how fast it can be; MODEL= may be a config.json alone
##      GPU=name             there instead of here (list: all that are known); ARGS= more flags: -c, --parallel, --type
## make lab              variants x caches x kernels beside the calculation: tables and pictures in lab/results/lab/
##      QUICK=1              a few points once, in build/lab/quick/
## make measure          speed, beside llama.cpp (compiled here first: 10 to 20 minutes); results in lab/results/
##      MEASURE="kernels speed paging variants"  ROUNDS=5    what, how often
## make gpu-kit          build/gpu-kit/: all that lab/gpu.py needs to check and measure the kernels on another machine's GPU

MEASURE ?= kernels speed paging variants
ROUNDS ?= 5

# What none of the parts in MEASURE needs is not fetched. Gemma 3 is measured where its file lies in models/.
SMOLLM2 := models/SmolLM2-135M-Instruct
MEASURED := $(SMOLLM2).Q4_1.gguf \
  $(if $(filter speed,$(MEASURE)),$(SMOLLM2).Q8_0.gguf $(wildcard models/gemma-3-270m-q4_k_m.gguf))
PROGRAMS := $(addprefix $(TEST)/,$(if $(filter kernels,$(MEASURE)),matmul_bench attention_bench) \
  $(if $(filter paging,$(MEASURE)),paging_bench))
$(TEST)/%_bench: $(TEST)/lab/%_bench.o $(TEST_STAGES)
	@$(COMPILE) -o $@ $^ $(LDLIBS)

# Binaries are built by makes below Python, which does not pass on the pipe of this one's jobs.
OWN_MAKES = MAKEFLAGS='$(filter-out --jobserver%,$(MAKEFLAGS))'
measure: .venv/exporter $(PROGRAMS) $(MEASURED) $(if $(filter speed paging,$(MEASURE)),.venv/lab)
	@for m in $(MEASURED); do $(MAKE) weights MODEL=$$m || exit 1; done
	@$(OWN_MAKES) $(PYTHON) lab/measure.py $(MEASURE) --rounds $(ROUNDS) \
	  --models $(MEASURED) $(if $(PROGRAMS),--programs $(PROGRAMS))
weights: $(SOURCE_READY)
	@$(WEIGHTS) >/dev/null
$(SMOLLM2).Q8_0.gguf: $(SMOLLM2).Q4_1.gguf | .venv/lab
	@$(PYTHON) lab/llama_cpp_peer.py quantize $< $@

lab: .venv/tests $(SMOLLM2).Q4_1.gguf
	@$(OWN_MAKES) $(PYTHON) lab/lab.py $(if $(QUICK),--quick,--rounds $(ROUNDS))

# Programs to be carried: for any GPU and any CPU of the last ten years.
CARRY := DEVICE=cuda CUDA_ARCH="$(CHECKED_ARCH)" ARCH=x86-64-v3
gpu-kit:
	@mkdir -p build/$@ && cp lab/gpu.py build/$@
	@for v in gqa mqa mha mla; do run=$$($(MAKE) -s binary $(CARRY) ATTENTION=$$v) && cp $$run build/$@/run-$$v || exit 1; done
	@$(MAKE) kit-programs $(CARRY)
kit-programs: $(EMULATED_TESTS:%=$(TEST)/$(GPU)/%) $(TEST)/$(GPU)/attention_case
	@cp $^ build/gpu-kit
$(TEST)/$(GPU)/attention_case: $(TEST)/lab/attention_case.o $(CU:%=$(TEST)/$(GPU)/%.o) $(SHARED)
	@$(COMPILE) -o $@ $^ $(CARRIED) $(LDLIBS) $(CUDA_LIBS)

estimate: ARGS =
estimate: $(SOURCE_READY)
	@weights=$$($(WEIGHTS)) && $(MAKE) all >&2 && ./run "$$weights" --estimate $(if $(GPU),--gpu "$(GPU)") $(ARGS)

.PHONY: estimate lab measure weights gpu-kit kit-programs
