/* fuzz_main.h - a fuzz target without libFuzzer: runs random inputs, as many as the argument says. The includer has LLVMFuzzerTestOneInput() and MAX_INPUT. */
#ifndef FUZZER
#include <stdlib.h>

#include "shadow.h"

int main(int argc, char **argv)
{
	int n = argc > 1 ? atoi(argv[1]) : 1;
	uint64_t state = 20261126;
	uint8_t data[MAX_INPUT];

	for (int i = 0; i < n; i++) {
		size_t n_bytes = next_random(&state) % MAX_INPUT;

		for (size_t k = 0; k < n_bytes; k++)
			data[k] = (uint8_t)(next_random(&state) >> 16);
		LLVMFuzzerTestOneInput(data, n_bytes);
	}
	return 0;
}
#endif
