/* text.c - what a name may be that others will read.
 *
 * Owns the rule; who sends a name judges it, so that a program's slip is an error of one call and no breach of the protocol. */
#include <stdint.h>

#include "memory.h"

/* Length of the UTF-8 character at s, 0 if there is none (RFC 3629: no overlong forms, no surrogates). */
static size_t utf8_bytes(const unsigned char *s)
{
	uint32_t code = s[0] < 0x80 ? s[0] : s[0] < 0xe0 ? s[0] & 0x1f : s[0] < 0xf0 ? s[0] & 0x0f : s[0] & 0x07;
	size_t n = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf5 ? 4 : 0;
	static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};

	for (size_t i = 1; i < n; i++) {
		if ((s[i] & 0xc0) != 0x80)
			return 0;
		code = code << 6 | (s[i] & 0x3f);
	}
	return n && code >= least[n] && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) ? n : 0;
}

/* Names travel as UTF-8 and reach terminals: no C0, DEL or C1. Everything but that is the program's taste. */
bool dm_is_text(const char *text)
{
	const unsigned char *s = (const unsigned char *)text;

	while (*s) {
		size_t n = utf8_bytes(s);

		if (!n || *s < 0x20 || *s == 0x7f || (s[0] == 0xc2 && s[1] < 0xa0))
			return false;
		s += n;
	}
	return true;
}
