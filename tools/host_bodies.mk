# SPDX-License-Identifier: Apache-2.0
# Builds the program of tests/kernels_on_host incrementally.
# make -f tools/host_bodies.mk OUT=FOLDER [SANITIZE=thread|address,undefined]
SOURCES := $(wildcard tests/kernels_on_host/*.cpp)
OBJECTS := $(SOURCES:tests/kernels_on_host/%.cpp=$(OUT)/%.o)
WERROR ?= -Werror
# -O0: compilation takes longer than the tests.
FLAGS := -std=c++20 -O0 -g -ffp-contract=off -Wall -Wextra $(WERROR)
SANITIZER := $(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-sanitize-recover=all)
# ThreadSanitizer must not instrument the fiber switches.
UNWATCHED := $(if $(filter thread,$(SANITIZE)),host_block)

$(OUT)/kernels_on_host: $(OBJECTS)
	$(CXX) $(SANITIZER) $^ -o $@

$(OUT)/%.o: tests/kernels_on_host/%.cpp
	@mkdir -p $(OUT)
	$(CXX) $(FLAGS) -MMD -MP $(if $(filter $(UNWATCHED),$*),-DADACACHE_THREAD_SANITIZER,$(SANITIZER)) -c $< -o $@

-include $(OBJECTS:.o=.d)
