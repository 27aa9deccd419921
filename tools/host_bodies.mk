# The program of tests/kernels_on_host without its tests: object by object, so that a change compiles little.
# make -f tools/host_bodies.mk OUT=FOLDER [SANITIZE=thread]
SOURCES := $(wildcard tests/kernels_on_host/*.cpp)
OBJECTS := $(SOURCES:tests/kernels_on_host/%.cpp=$(OUT)/%.o)
FLAGS := -std=c++20 -O0 -ffp-contract=off
SANITIZER := $(if $(SANITIZE),-fsanitize=$(SANITIZE))

$(OUT)/kernels_on_host: $(OBJECTS)
	$(CXX) $(SANITIZER) $^ -o $@

$(OUT)/%.o: tests/kernels_on_host/%.cpp
	@mkdir -p $(OUT)
	$(CXX) $(FLAGS) -MMD -MP $(if $(and $(SANITIZE),$(filter host_block,$*)),-DADACACHE_THREAD_SANITIZER,$(SANITIZER)) -c $< -o $@

-include $(OBJECTS:.o=.d)
