# eep: elastic expert parallelism.  `make help` lists the targets.
#
# Variables: BUILD (folder of outputs), CC, SANITIZE (address,undefined or thread), WERROR=1, CUDA=0 or NCCL=0 (build
# without), CUDA_HOME, NCCL_HOME (where they are), LINK=static (third-party libraries inside the programs: the bundle).

BUILD    ?= build
comma    := ,
ifeq ($(origin CC),default)
CC       := gcc
endif
CSTD     := -std=c11 -D_GNU_SOURCE
WARN     := -Wall -Wextra -Wshadow -Wconversion -Wstrict-prototypes -Wmissing-prototypes
ifeq ($(WERROR),1)
WARN     += -Werror
endif
OPT      ?= -O2 -g
HARDEN   := -fstack-protector-strong -fstack-clash-protection -fPIC
ifneq ($(SANITIZE),)
HARDEN   += -fsanitize=$(SANITIZE) -fno-omit-frame-pointer -fno-sanitize-recover=undefined
override LDFLAGS += -fsanitize=$(SANITIZE)
else
HARDEN   += -D_FORTIFY_SOURCE=2
override LDFLAGS += -Wl,-z,relro,-z,now
endif
# The caller's own flags, from the environment or the command line, are added to ours and come last.
override CPPFLAGS := -I. -I$(BUILD)/proto $(CPPFLAGS)
override CFLAGS   := $(CSTD) $(WARN) $(OPT) $(HARDEN) -MMD -MP $(CFLAGS)
# Libraries that are not libc's own: shared, or with LINK=static inside the programs.
third     = $(if $(filter static,$(LINK)),-Wl$(comma)-Bstatic $(1) -Wl$(comma)-Bdynamic,$(1))
LIBS     := $(call third,-levent_openssl -levent_pthreads -levent -lprotobuf-c -llmdb -ljansson -linih -lssl -lcrypto) -lpthread -ldl -lm
CHECK_LIBS = $(call third,$(filter-out -lrt -lm,$(shell pkg-config --libs check 2>/dev/null))) -lrt

# ---- GPUs: only headers and nvcc are needed to build; libcuda and libnccl are loaded at run time ----
first_with = $(firstword $(foreach d,$(2),$(if $(wildcard $(d)/$(1)),$(d))))
header_int = $(shell sed -n 's/^\#define $(2) *\([0-9][0-9]*\).*/\1/p' $(1) | head -n 1)

CUDA_HOMES := $(CUDA_HOME) $(CUDA_PATH) /usr/local/cuda
ifneq ($(CUDA),0)
CUDA_INC   := $(call first_with,cuda.h,$(CUDA_HOMES:%=%/include) /usr/include /usr/local/include)
endif
HAVE_CUDA  := $(if $(CUDA_INC),1)
ifeq ($(HAVE_CUDA),1)
NVCC       ?= $(firstword $(wildcard $(CUDA_HOMES:%=%/bin/nvcc)) $(shell command -v nvcc 2>/dev/null))
ifneq ($(NCCL),0)
NCCL_INC   := $(call first_with,nccl.h,$(NCCL_HOME:%=%/include) $(CUDA_INC) /usr/include /usr/local/include)
endif
endif
HAVE_NVCC  := $(if $(NVCC),1)
HAVE_NCCL  := $(if $(NCCL_INC),1)
# sources whose headers, or whose compiler, are there; the stubs of the others
CUDA_SRC   := agent/cuda_driver.c agent/cuda_memory.c agent/memory_cuda.c agent/libeep/device_cuda.c agent/libeep/device_steps.c tests/engine/compute_cuda.c tests/harness/gpu_memory.c $(filter-out %_stub.c,$(wildcard agent/transport_cuda_peer*.c))
CUDA_STUBS := agent/cuda_driver_stub.c agent/memory_cuda_stub.c agent/transport_cuda_peer_stub.c agent/libeep/device_stub.c tests/engine/compute_cuda_stub.c tests/harness/gpu_memory_stub.c
NCCL_SRC   := $(filter-out %_stub.c,$(wildcard agent/transport_nccl*.c agent/nccl_*.c))
NCCL_STUBS := agent/transport_nccl_stub.c
GPU_OUT    := $(if $(HAVE_CUDA),$(CUDA_STUBS),$(CUDA_SRC) agent/digest_kernel.c agent/digest_kernel_stub.c tests/engine/kernels_image.c tests/engine/kernels_image_stub.c)
GPU_OUT    += $(if $(HAVE_NCCL),$(NCCL_STUBS),$(NCCL_SRC))
GPU_OUT    += $(if $(HAVE_NVCC),agent/digest_kernel_stub.c tests/engine/kernels_image_stub.c,agent/digest_kernel.c tests/engine/kernels_image.c)
ifeq ($(MAKELEVEL)$(filter help clean format deps deps-test,$(MAKECMDGOALS)),0)
gpu_nccl   := $(if $(HAVE_NCCL),NCCL $(call header_int,$(NCCL_INC)/nccl.h,NCCL_MAJOR).$(call header_int,$(NCCL_INC)/nccl.h,NCCL_MINOR),no NCCL headers)
gpu_nvcc   := $(if $(HAVE_NVCC),nvcc $(shell $(NVCC) --version | sed -n 's/.*release \([0-9.]*\).*/\1/p'),no nvcc (digests on the CPU))
$(info GPU backend: $(if $(HAVE_CUDA),CUDA headers in $(CUDA_INC)$(comma) $(gpu_nvcc)$(comma) $(gpu_nccl),none (no cuda.h; CUDA_HOME names another place)))
endif

PROTOS     := $(wildcard proto/*.proto)
PROTO_SRC  := $(PROTOS:proto/%.proto=$(BUILD)/proto/%.pb-c.c)
PROTO_HDR  := $(PROTO_SRC:.c=.h)
COMMON_SRC := $(wildcard common/*.c)
COORD_SRC  := $(filter-out coordinator/main.c,$(wildcard coordinator/*.c))
CTL_SRC    := $(wildcard coordinator/eepctl/*.c)
AGENT_SRC  := $(filter-out agent/main.c $(GPU_OUT),$(wildcard agent/*.c))
LIBEEP_SRC := $(filter-out $(GPU_OUT),$(wildcard agent/libeep/*.c))
SIM_SRC    := $(wildcard tests/sim/*.c)
ENGINE_SRC := $(filter-out $(GPU_OUT),$(wildcard tests/engine/*.c))
FEEDER_SRC := $(wildcard tests/feeder/*.c)
UNIT_SRC   := $(wildcard tests/unit/test_*.c)
UNIT_BIN   := $(UNIT_SRC:tests/unit/%.c=$(BUILD)/tests/%)
BENCH_SRC  := $(wildcard tests/bench/bench_*.c)
BENCH_BIN  := $(BENCH_SRC:tests/bench/%.c=$(BUILD)/tests/%)

# the CUDA driver on host memory, for tests; only where cuda.h is
FAKECUDA_SRC := $(if $(HAVE_CUDA),$(wildcard tests/fakecuda/*.c))
FAKENCCL_SRC := $(if $(HAVE_NCCL),$(wildcard tests/fakenccl/*.c))
FAKECUDA   := $(if $(HAVE_CUDA),$(BUILD)/fakecuda/libcuda.so.1) $(if $(HAVE_NCCL),$(BUILD)/fakecuda/libnccl.so.2)

obj = $(patsubst %.c,$(BUILD)/%.o,$(patsubst $(BUILD)/%,%,$(1)))

BIN := $(BUILD)/eep-coordinator $(BUILD)/eep-agent $(BUILD)/eep-keeper $(BUILD)/eepctl $(BUILD)/libeep.so $(BUILD)/libeep.a

.PHONY: all
all: $(BIN) test-tools

# ---- rules ----
$(BUILD)/proto/%.pb-c.c $(BUILD)/proto/%.pb-c.h &: proto/%.proto
	@mkdir -p $(BUILD)/proto
	protoc-c --proto_path=proto --c_out=$(BUILD)/proto $<
$(BUILD)/proto/%.o: $(BUILD)/proto/%.c
	$(CC) $(CPPFLAGS) $(CFLAGS) -w -c -o $@ $<
$(BUILD)/%.o: %.c | $(PROTO_HDR)
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) -c -o $@ $<

ifeq ($(HAVE_CUDA),1)
$(call obj,$(CUDA_SRC) $(FAKECUDA_SRC)): override CPPFLAGS += -isystem $(CUDA_INC)
$(call obj,$(NCCL_SRC) $(FAKENCCL_SRC)): override CPPFLAGS += -isystem $(CUDA_INC) -isystem $(NCCL_INC)
$(BUILD)/agent/digest_kernel.o: override CPPFLAGS += -DDIGEST_FATBIN='"$(BUILD)/agent/digest_kernel.fatbin"'
$(BUILD)/agent/digest_kernel.o: $(BUILD)/agent/digest_kernel.fatbin
$(BUILD)/tests/engine/kernels_image.o: override CPPFLAGS += -DKERNELS_FATBIN='"$(BUILD)/tests/engine/kernels.fatbin"'
$(BUILD)/tests/engine/kernels_image.o: $(BUILD)/tests/engine/kernels.fatbin
# the results are compared bit for bit between placements, and with the host's
$(BUILD)/tests/engine/kernels.fatbin: NVCC_FLAGS += --fmad=false
$(BUILD)/tests/engine/kernels.fatbin: tests/engine/kernels.h
$(BUILD)/tests/fakecuda/kernels_engine.o: tests/engine/kernels.cu
endif
# sm_90 as machine code; newer and older GPUs translate the compute_80 form when they load it
NVCC_FLAGS ?= -O3 -std=c++17 -gencode arch=compute_80,code=compute_80 -gencode arch=compute_90,code=sm_90
$(BUILD)/%.fatbin: %.cu %.h common/digest.h
	@mkdir -p $(@D)
	$(NVCC) -fatbin $(NVCC_FLAGS) -I. -o $@ $<

.SECONDARY: $(PROTO_SRC) $(PROTO_HDR)

$(BUILD)/libcommon.a: $(call obj,$(COMMON_SRC)) $(PROTO_SRC:.c=.o)
	rm -f $@ && ar rcs $@ $^
$(BUILD)/libcoordinator.a: $(call obj,$(COORD_SRC))
	rm -f $@ && ar rcs $@ $^
$(BUILD)/libagent.a: $(call obj,$(AGENT_SRC))
	rm -f $@ && ar rcs $@ $^
# what libeep shares with the agent: the manifest, the frames of the engine socket, the CUDA driver
LIBEEP_SHARED := agent/manifest.c agent/manifest_wire.c agent/engine_frame.c agent/dtype.c
LIBEEP_SHARED += $(if $(HAVE_CUDA),agent/cuda_driver.c agent/cuda_memory.c agent/gpu_errors.c)
$(BUILD)/agent/libeep/%.o: override CFLAGS += -fvisibility=hidden
$(BUILD)/libeep.a: $(call obj,$(LIBEEP_SRC) $(LIBEEP_SHARED))
	rm -f $@ && ar rcs $@ $^

$(BUILD)/eep-coordinator: $(call obj,coordinator/main.c) $(BUILD)/libcoordinator.a $(BUILD)/libcommon.a
	$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)
$(BUILD)/eep-agent: $(call obj,agent/main.c) $(BUILD)/libagent.a $(BUILD)/libcommon.a
	$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)
$(BUILD)/eep-keeper: $(call obj,$(wildcard agent/keeper/*.c)) $(BUILD)/libcommon.a
	$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)
$(BUILD)/eepctl: $(call obj,$(CTL_SRC)) $(BUILD)/libcoordinator.a $(BUILD)/libagent.a $(BUILD)/libcommon.a
	$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)
$(BUILD)/libeep.so: $(call obj,$(LIBEEP_SRC)) $(BUILD)/libagent.a $(BUILD)/libcommon.a
	$(CC) $(LDFLAGS) -shared -Wl,-soname,libeep.so.0 -Wl,--exclude-libs,ALL -o $@ $^ $(call third,-lprotobuf-c) -lpthread -ldl

# ---- test programs (instruments, not products) ----
TEST_LIBS := $(BUILD)/libcoordinator.a $(BUILD)/libagent.a $(BUILD)/libeep.a $(BUILD)/libcommon.a
# tests that call the driver themselves; without it they skip themselves, or a part
ifeq ($(HAVE_CUDA),1)
GPU_TESTS := $(BUILD)/tests/test_libeep_gpu $(BUILD)/tests/test_reference_model
$(GPU_TESTS) $(BUILD)/tests/test_fakecuda $(BUILD)/tests/test_cuda_faults: override CPPFLAGS += -isystem $(CUDA_INC) -DHAVE_CUDA
$(GPU_TESTS): $(BUILD)/tests/engine/kernels_image$(if $(HAVE_NVCC),,_stub).o
endif
$(BUILD)/tests/test_reference_model: $(BUILD)/tests/engine/compute_cuda$(if $(HAVE_CUDA),,_stub).o
HARNESS   := $(call obj,$(filter-out $(GPU_OUT) tests/harness/fault_%.c,$(wildcard tests/harness/*.c)))
# preloaded into daemons by tests: faults of the disk and of the clock, and at edges of the state machines
$(BUILD)/tests/fault_%.so: tests/harness/fault_%.c
	@mkdir -p $(@D)
	$(CC) $(CSTD) $(WARN) -O1 -g -fPIC -shared -o $@ $< -ldl
$(BUILD)/tests/test_journal_faults: | $(BUILD)/tests/fault_disk.so
$(BUILD)/tests/test_%: tests/unit/test_%.c $(TEST_LIBS)
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -o $@ $< $(filter %.o,$^) $(TEST_LIBS) $(CHECK_LIBS) $(LIBS)
$(BUILD)/tests/itest_%: tests/integration/itest_%.c $(HARNESS) $(TEST_LIBS)
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -o $@ $< $(HARNESS) $(TEST_LIBS) $(CHECK_LIBS) $(LIBS)
$(BUILD)/tests/bench_%: tests/bench/bench_%.c $(HARNESS) $(TEST_LIBS)
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -o $@ $< $(HARNESS) $(TEST_LIBS) $(LIBS)
$(BUILD)/tests/nccl_abort: tests/gpu/nccl_abort.c $(TEST_LIBS)
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -o $@ $< $(TEST_LIBS) $(LIBS)
# of GPUs: only where the headers are that they include
GPU_BENCH := $(if $(HAVE_CUDA),$(BUILD)/tests/bench_peer) $(if $(HAVE_NCCL),$(BUILD)/tests/bench_nccl $(BUILD)/tests/bench_several)
$(BUILD)/tests/gpu/bench%.o: override CPPFLAGS += $(if $(HAVE_CUDA),-isystem $(CUDA_INC)) $(if $(HAVE_NCCL),-isystem $(NCCL_INC))
$(GPU_BENCH): $(BUILD)/tests/bench_%: $(BUILD)/tests/gpu/bench_%.o $(BUILD)/tests/gpu/bench.o $(TEST_LIBS)
	$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)
$(BUILD)/tests/bench_several: $(BUILD)/tests/gpu/bench_plain.o $(BUILD)/tests/gpu/bench_sweep.o
$(BUILD)/tests/eep-make-checkpoint: $(call obj,tests/gpu/make_checkpoint.c tests/gpu/checkpoint_models.c tests/gpu/checkpoint_tables.c) $(BUILD)/libcommon.a
	@mkdir -p $(@D)
	$(CC) $(LDFLAGS) -o $@ $^ -lpthread
$(BUILD)/tests/eep-idle-engine: $(call obj,tests/gpu/idle_engine.c) $(BUILD)/libeep.a $(BUILD)/libcommon.a
	@mkdir -p $(@D)
	$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)
.PHONY: fakecuda
fakecuda: $(FAKECUDA)
$(BUILD)/fakecuda/libcuda.so.1: $(call obj,$(FAKECUDA_SRC)) $(BUILD)/libcommon.a tests/fakecuda/export.map
	@mkdir -p $(@D)
	$(CC) $(LDFLAGS) -shared -Wl,-soname,libcuda.so.1 -Wl,-z,nodelete -Wl,--version-script=tests/fakecuda/export.map \
	  -o $@ $(filter-out %.map,$^) -lpthread -lm
$(BUILD)/fakecuda/libnccl.so.2: $(call obj,$(FAKENCCL_SRC)) tests/fakenccl/export.map | $(BUILD)/fakecuda/libcuda.so.1
	$(CC) $(LDFLAGS) -shared -Wl,-soname,libnccl.so.2 -Wl,--version-script=tests/fakenccl/export.map -o $@ \
	  $(filter-out %.map,$^) $(BUILD)/fakecuda/libcuda.so.1 -lpthread
$(BUILD)/tests/eep-sim: $(call obj,$(SIM_SRC)) $(TEST_LIBS)
	@mkdir -p $(@D)
	$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)
$(BUILD)/tests/eep-engine: $(call obj,$(ENGINE_SRC)) $(TEST_LIBS)
	@mkdir -p $(@D)
	$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)
$(BUILD)/tests/eep-feeder: $(call obj,$(FEEDER_SRC)) $(TEST_LIBS)
	@mkdir -p $(@D)
	$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)
$(BUILD)/tests/eep-demo: $(call obj,$(wildcard tests/demo/*.c)) $(HARNESS) $(TEST_LIBS)
	@mkdir -p $(@D)
	$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)

# fuzz targets: replayed over their corpus by make check; with libFuzzer by make fuzz
FUZZ      := $(patsubst tests/fuzz/fuzz_%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
$(BUILD)/tests/replay_%: tests/fuzz/fuzz_%.c tests/fuzz/replay.c $(TEST_LIBS)
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -o $@ $< tests/fuzz/replay.c $(TEST_LIBS) $(LIBS)
$(BUILD)/tests/fuzz_%: tests/fuzz/fuzz_%.c $(TEST_LIBS)
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -fsanitize=fuzzer -o $@ $< $(TEST_LIBS) $(LIBS)

.PHONY: test-tools
test-tools: $(BUILD)/tests/fault_disk.so $(BUILD)/tests/fault_edge.so $(BUILD)/tests/fault_clock.so $(BUILD)/tests/fault_plan.so $(BUILD)/tests/eep-engine \
            $(BUILD)/tests/eep-feeder $(BUILD)/tests/eep-demo $(BUILD)/tests/eep-make-checkpoint $(BUILD)/tests/eep-idle-engine

# ---- what a newcomer runs ----
DEPS      := gcc libc6-dev make pkg-config protobuf-c-compiler protobuf-compiler libprotobuf-c-dev libevent-dev \
             liblmdb-dev libjansson-dev libinih-dev libssl-dev uthash-dev
DEPS_TEST := check strace iproute2 nftables systemd openssl
missing    = $(shell for p in $(1); do dpkg-query -W -f='$${db:Status-Status}' $$p 2>/dev/null | grep -qx installed || echo $$p; done)
define install
	@missing="$(call missing,$(1))"; \
	if [ -z "$$missing" ]; then echo "packages are there: $(1)"; \
	elif [ "$$(id -u)" != 0 ]; then echo "missing packages: $$missing; run 'make $@' once as root (it installs them with apt-get)" >&2; exit 1; \
	else echo "installing: $$missing"; apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing >/dev/null; fi
endef

# after a build that failed: it may be for want of packages
hint       = missing="$(call missing,$(DEPS))"; [ -z "$$missing" ] || echo "missing packages: $$missing; run 'make deps' once as root" >&2; exit 1

.PHONY: deps deps-test demo check sim bench clean help install format
deps:      ## install what building and running need (as root, once)
	$(call install,$(DEPS))
deps-test: ## install what only the tests need (as root, once)
	$(call install,$(DEPS) $(DEPS_TEST))
	@command -v promtool >/dev/null || { echo "installing: promtool" && tests/systemd/promtool.sh; }

# "make -j deps demo" must not build before the packages are there
ifneq ($(filter deps deps-test,$(MAKECMDGOALS)),)
demo check check-unit sim bench bundle bundle-test: $(filter deps deps-test,$(MAKECMDGOALS))
endif
demo:      ## watch a served model go 2 -> 4 -> 3 -> 2 -> 4 ranks under load
	@[ -x $(BUILD)/tests/eep-demo ] || echo "building in $(BUILD), which takes less than a minute"
	@$(MAKE) --no-print-directory -s -j2 all || { $(hint); }
	@EEP_BIN=$(BUILD) $(BUILD)/tests/eep-demo $(DEMO)

SIM_SEEDS ?= 2000
ITEST_SRC := $(wildcard tests/integration/itest_*.c)
ITEST_BIN := $(ITEST_SRC:tests/integration/%.c=$(BUILD)/tests/%)
.PHONY: check-deps check-build check-unit check-sim check-integration
check-deps:
	@missing="$(call missing,$(DEPS_TEST))"; if [ -n "$$missing" ]; then \
	  echo "the tests also need: $$missing; run 'make deps-test' once as root" >&2; exit 1; fi
check-build: check-deps ## what `make check` runs, built and not run
	@$(MAKE) --no-print-directory -j2 all $(UNIT_BIN) $(ITEST_BIN) $(FUZZ:%=$(BUILD)/tests/replay_%) $(BUILD)/tests/eep-sim $(FAKECUDA) $(GPU_BENCH) || { $(hint); }
check: check-build ## all tests: unit, simulation, integration with the real daemons
	@BUILD=$(BUILD) SANITIZE=$(SANITIZE) SIM_SEEDS=$(SIM_SEEDS) FUZZ="$(FUZZ)" tests/run.sh $(notdir $(UNIT_BIN)) -- $(notdir $(ITEST_BIN))
check-unit: check-deps ## unit tests alone
	@$(MAKE) --no-print-directory -j2 $(UNIT_BIN) $(FAKECUDA)
	@BUILD=$(BUILD) SIM_SEEDS=0 tests/run.sh $(notdir $(UNIT_BIN)) --
sim:       ## more of the simulation: make sim SIM_SEEDS=100000
	@$(MAKE) --no-print-directory -j2 $(BUILD)/tests/eep-sim
	$(BUILD)/tests/eep-sim --seeds $(SIM_SEEDS)
.PHONY: check-torch
check-torch: ## PyTorch's own client over our TCPStore port, where PyTorch is (PYTHON=python3)
	@$(MAKE) --no-print-directory -s -j2 $(BUILD)/eep-coordinator
	@tests/gpu/tcpstore.sh $(BUILD)
.PHONY: check-torch-upstream
check-torch-upstream: ## PyTorch's own store tests over our TCPStore port (TORCH_TESTS=.../test/distributed/test_store.py PYTHON=python3)
	@[ -f "$(TORCH_TESTS)" ] || { echo "TORCH_TESTS must name PyTorch's test/distributed/test_store.py" >&2; exit 2; }
	@$(MAKE) --no-print-directory -s -j2 $(BUILD)/eep-coordinator
	@EEP_BIN=$(BUILD) PYTHONDONTWRITEBYTECODE=1 $(PYTHON) tests/python/torch_upstream.py $(TORCH_TESTS)
PYTHON ?= python3
.PHONY: check-python
check-python: ## the Python package, and the PyTorch engine where PyTorch and transformers are (PYTHON=python3)
	@$(MAKE) --no-print-directory -s -j2 all
	@EEP_BIN=$(BUILD) CC=$(CC) tests/python/run.sh $(PYTHON)
FUZZ_SECONDS ?= 60
.PHONY: fuzz
fuzz:      ## libFuzzer (clang) on each target: make fuzz FUZZ_SECONDS=60
	@$(MAKE) --no-print-directory -s -j2 BUILD=$(BUILD)-fuzz CC=clang SANITIZE=fuzzer-no-link,address,undefined $(FUZZ:%=$(BUILD)-fuzz/tests/fuzz_%)
	@for t in $(FUZZ); do mkdir -p $(BUILD)-fuzz/found/$$t && $(BUILD)-fuzz/tests/fuzz_$$t -max_total_time=$(FUZZ_SECONDS) \
	  -rss_limit_mb=1024 -malloc_limit_mb=256 -print_final_stats=1 $(BUILD)-fuzz/found/$$t tests/fuzz/corpus/$$t || exit 1; done
PLANS ?= 4000
.PHONY: plans
plans:     ## more random plans, each walked round by round: make plans PLANS=4000
	@$(MAKE) --no-print-directory -j2 $(BUILD)/tests/test_planner_figures
	EEP_PLANS=$(PLANS) $(BUILD)/tests/test_planner_figures
.PHONY: plot
plot:      ## docs/placement.png: balance against arrivals (needs gnuplot)
	@$(MAKE) --no-print-directory -j2 $(BUILD)/tests/bench_planner
	tests/placement/plot.sh $(BUILD)/tests/bench_planner docs/placement.png
.PHONY: fault-matrix
fault-matrix: ## every role x state x fault on the real daemons, a quarter of an hour; the sample of `make check` is part of it
	@$(MAKE) --no-print-directory -j2 all $(BUILD)/tests/itest_matrix
	@EEP_BIN=$(BUILD) $(BUILD)/tests/itest_matrix --all
SOAK_SECONDS ?= 3600
.PHONY: soak
soak:      ## faults at random moments for long: an hour, or make soak SOAK_SECONDS=600
	@$(MAKE) --no-print-directory -j2 all $(BUILD)/tests/itest_chaos
	@EEP_BIN=$(BUILD) $(BUILD)/tests/itest_chaos --seconds $(SOAK_SECONDS) --agents 8
bench:     ## the figures of docs/figures.md
	@$(MAKE) --no-print-directory -j2 all $(BENCH_BIN)
	@EEP_BIN=$(BUILD) tests/bench/run.sh $(BUILD)/tests
.PHONY: bench-load
bench-load: ## how fast a checkpoint of real shapes loads (8 GB of memory, or BENCH_LOAD_MEMORY=cuda)
	@$(MAKE) --no-print-directory -j2 $(BUILD)/tests/bench_load $(BUILD)/tests/eep-make-checkpoint
	@tests/bench/load.sh $(BUILD)/tests

PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
UNITDIR ?= $(PREFIX)/lib/systemd/system
VERSION := $(shell sed -n 's/^\#define EEP_SOFTWARE "\(.*\)"/\1/p' common/version.h)
UNITS  := $(notdir $(wildcard systemd/*.service systemd/*.socket systemd/*.target))
install: $(BIN) ## install programs, library, header, systemd units, docs (PREFIX=/usr/local, LIBDIR=PREFIX/lib, DESTDIR=)
	install -d $(addprefix $(DESTDIR)$(PREFIX)/,bin include lib/sysusers.d lib/tmpfiles.d share/doc/eep share/eep) \
	  $(DESTDIR)$(LIBDIR) $(DESTDIR)$(UNITDIR)
	install -m 755 $(BUILD)/eep-coordinator $(BUILD)/eep-agent $(BUILD)/eep-keeper $(BUILD)/eepctl systemd/eep-ca $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(BUILD)/libeep.so $(DESTDIR)$(LIBDIR)/libeep.so.0
	ln -sf libeep.so.0 $(DESTDIR)$(LIBDIR)/libeep.so
	install -m 644 agent/libeep/eep.h $(DESTDIR)$(PREFIX)/include
	install -m 644 docs/*.md $(DESTDIR)$(PREFIX)/share/doc/eep
	install -m 644 systemd/config/*.conf systemd/eep.rules.yml $(DESTDIR)$(PREFIX)/share/eep
	install -m 644 systemd/eep.sysusers $(DESTDIR)$(PREFIX)/lib/sysusers.d/eep.conf
	install -m 644 systemd/eep.tmpfiles $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/eep.conf
	for unit in $(UNITS); do \
	  sed 's|/usr/local|$(PREFIX)|g' systemd/$$unit >$(DESTDIR)$(UNITDIR)/$$unit || exit 1; done

DEPS_DEB := help2man debhelper dpkg-dev lintian
.PHONY: deps-deb man install-man deb check-deb
deps-deb:  ## install what only building packages needs (as root, once)
	$(call install,$(DEPS) $(DEPS_DEB))
man: $(BIN) ## manual pages, in BUILD/man (needs help2man)
	systemd/man.sh $(BUILD) $(VERSION)
install-man: man
	for page in $(BUILD)/man/*; do install -D -m 644 $$page $(DESTDIR)$(PREFIX)/share/man/man$${page##*.}/$${page##*/} || exit 1; done
deb:       ## Debian packages, in BUILD/deb: coordinator, agent, eepctl, libeep0, libeep-dev, common files (make deps-deb)
	@systemd/deb.sh $(BUILD)
check-deb: deb ## packages installed, upgraded and removed in a Debian 12 tree (root; debootstrap makes TREE)
	@tests/systemd/packages.sh $(BUILD) $(TREE)

# for bash, and for zsh, whose function asks the other
.PHONY: install-completion
install: install-completion
install-completion:
	install -D -m 644 coordinator/eepctl/completion/eepctl.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/eepctl
	install -D -m 644 coordinator/eepctl/completion/_eepctl $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_eepctl

.PHONY: check-units
check-units: $(BIN) ## systemd-analyze on the units: no complaint, and how exposed they are
	@tests/systemd/units.sh $(BUILD)
.PHONY: check-systemd
TREE ?= $(BUILD)/debian-tree
check-systemd: all ## a systemd in namespaces runs the units: scaling, deaths, restart, reload, stop (root; debootstrap makes TREE)
	@tests/systemd/boot.sh $(BUILD) $(TREE)

include systemd/bundle/rules.mk

format:    ## lay out the code
	clang-format -i $$(git ls-files '*.c' '*.h')
clean:
	rm -rf $(BUILD)
help:      ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

# not in a Debian tree that tests unpack there, whose folders of services are called so, too
-include $(shell find $(BUILD) -name debian-tree -prune -o -name '*.d' -type f -print 2>/dev/null)
