# make bundle, bundle-test: tarballs that run on any Linux with glibc 2.34 or newer.  Third-party libraries are inside the
# programs; outside are libc's own, and what is loaded at run time (libcuda, libnccl).
#
# Built in $(BUILD)/bundle with LINK=static, where the unstripped programs stay (for a debugger; the build ids match).
# The same commit gives the same bytes, wherever it is built: folders are mapped out of what the compiler writes, and
# packed files carry the commit's time.

BUNDLE       = eep-$(shell sed -n 's/^\#define EEP_SOFTWARE "\(.*\)"/\1/p' common/version.h)-linux-$(shell uname -m)
BUNDLE_OPT   = $(OPT) -ffile-prefix-map=$(CURDIR)=. -ffile-prefix-map=$(BUILD)/bundle=build
BUNDLE_MAKE  = $(MAKE) --no-print-directory -s -j2 BUILD=$(BUILD)/bundle LINK=static OPT='$(BUNDLE_OPT)'
# what is to run on a machine where nothing can be built: instruments
BUNDLE_TESTS = eep-engine eep-feeder eep-demo eep-make-checkpoint eep-idle-engine nccl_abort test_memory test_transport_gpu \
               test_libeep_gpu test_reference_model itest_checkpoint itest_gpu_faults itest_readopt itest_chaos $(GPU_BENCH:$(BUILD)/tests/%=%) \
               $(BENCH_BIN:$(BUILD)/tests/%=%)

.PHONY: bundle bundle-test check-bundle bundle-programs bundle-test-programs
bundle:    ## a tarball that runs on any Linux with glibc 2.34 or newer (INSTALL in it)
	@$(BUNDLE_MAKE) bundle-programs || { $(hint); }
	+@systemd/bundle/pack.sh $(BUILD)/bundle $(BUILD)/$(BUNDLE).tar.gz
bundle-test: check-deps bundle ## another one with the test instruments in it, for a machine with GPUs
	@$(BUNDLE_MAKE) bundle-programs bundle-test-programs || { $(hint); }
	+@systemd/bundle/pack.sh $(BUILD)/bundle $(BUILD)/$(BUNDLE)-tests.tar.gz $(BUNDLE_TESTS)
check-bundle: bundle-test ## unpack both tarballs, look at every ELF file, run them
	@tests/bundle/check.sh $(BUILD)/$(BUNDLE).tar.gz $(BUILD)/$(BUNDLE)-tests.tar.gz $(if $(HAVE_CUDA),gpu)

bundle-programs: $(BIN) $(BUILD)/whole/libeep.a
bundle-test-programs: $(BUNDLE_TESTS:%=$(BUILD)/tests/%)

# libeep.a for engines: all that it needs in one object, of which only the names of eep.h can be seen
$(BUILD)/whole/libeep.a: $(call obj,$(LIBEEP_SRC)) $(BUILD)/libagent.a $(BUILD)/libcommon.a $(BUILD)/libeep.so
	@mkdir -p $(@D)
	nm -D --defined-only --format=posix $(BUILD)/libeep.so | cut -d' ' -f1 >$(@D)/names
	$(CC) -r -nostdlib -o $(@D)/eep.o $(filter-out %.so,$^) -Wl,-Bstatic -lprotobuf-c
	objcopy --keep-global-symbols=$(@D)/names $(@D)/eep.o
	rm -f $@ && ar rcs $@ $(@D)/eep.o

ifeq ($(LINK),static)
# An object, not a part of libcommon.a: it is libevent.a, later on the command line, that asks for it.
LIBS += $(BUILD)/systemd/bundle/arc4random.o
$(BUILD)/libcommon.a: | $(BUILD)/systemd/bundle/arc4random.o
endif
