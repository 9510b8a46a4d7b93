/*
 * CHECK(condition) for the programs in this folder: says what failed and where, and ends the program with status 1.
 * Unlike assert() it is never compiled out.
 */
#ifndef DM_TEST_CHECK_H
#define DM_TEST_CHECK_H

#include <stdio.h>
#include <stdlib.h>

static inline void check_failed(const char *file, int line, const char *condition)
{
	fprintf(stderr, "%s:%d: %s\n", file, line, condition);
	exit(1);
}

#define CHECK(condition) ((condition) ? (void)0 : check_failed(__FILE__, __LINE__, #condition))

#endif
