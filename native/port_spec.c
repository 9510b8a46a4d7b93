/* port_spec.c - the name of a port as people write it: "transport:key=value,key=value".
 *
 * Owns that grammar (docs/ports.md) and its canonical form, by which joiners are told from people who mean another port: keys in order, each
 * with its "key=". The first item may stand without a key: it is the interface then ("packet:eth0" is "packet:iface=eth0").
 * What a value means is the transport's. No value has a comma: nothing is escaped. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "port.h"

enum { KEY_BYTES = 16, VALUE_BYTES = 108, MAX_PAIRS = 12 };
static_assert(sizeof(((struct dm_port_keys *)0)->pairs[0].key) == KEY_BYTES, "see port.h");
static_assert(sizeof(((struct dm_port_keys *)0)->pairs[0].value) == VALUE_BYTES, "see port.h");
static_assert(sizeof(((struct dm_port_keys *)0)->pairs) / sizeof(((struct dm_port_keys *)0)->pairs[0]) == MAX_PAIRS, "see port.h");

static const char word_chars[] = "abcdefghijklmnopqrstuvwxyz0123456789_";
#define NAME_CHARS "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-"
static const char derived_chars[] = NAME_CHARS ":"; /* a PCI address has colons */
static const char name_chars[] = NAME_CHARS;

#define GRAMMAR "a port is named \"transport:key=value,key=value\", as in \"ring:name=lo0,queues=2\""

/* ---- parsing ---- */

static bool is_word(const char *text, size_t n, size_t bytes)
{
	return n > 0 && n < bytes && strspn(text, word_chars) >= n;
}

static int add_pair(struct dm_memory *m, const char *spec, struct dm_port_keys *out, const char *key, size_t key_n, const char *value, size_t n)
{
	char name[KEY_BYTES];

	if (!is_word(key, key_n, KEY_BYTES))
		return dm_fail(m, -EINVAL, "port \"%s\": \"%.*s\" is no key: small letters, digits and '_', at most %d of them", spec, (int)key_n,
			       key, KEY_BYTES - 1);
	if (n == 0 || n >= VALUE_BYTES)
		return dm_fail(m, -EINVAL, "port \"%s\": the value of \"%.*s\" has %zu bytes: 1 to %d are possible", spec, (int)key_n, key, n,
			       VALUE_BYTES - 1);
	if (out->n == MAX_PAIRS)
		return dm_fail(m, -EINVAL, "port \"%s\": more than %d keys", spec, MAX_PAIRS);
	memcpy(name, key, key_n);
	name[key_n] = '\0';
	if (dm_port_key(out, name) != NULL)
		return dm_fail(m, -EINVAL, "port \"%s\": \"%s\" is given twice", spec, name);
	strcpy(out->pairs[out->n].key, name);
	memcpy(out->pairs[out->n].value, value, n);
	out->pairs[out->n++].value[n] = '\0';
	return 0;
}

static int add_item(struct dm_memory *m, const char *spec, struct dm_port_keys *out, const char *item, size_t n)
{
	const char *equals = memchr(item, '=', n);

	if (n == 0)
		return dm_fail(m, -EINVAL, "port \"%s\": there is nothing between two commas, or behind the last one", spec);
	if (equals != NULL)
		return add_pair(m, spec, out, item, (size_t)(equals - item), equals + 1, n - (size_t)(equals - item) - 1);
	if (out->n > 0)
		return dm_fail(m, -EINVAL, "port \"%s\": \"%.*s\" has no '=': " GRAMMAR, spec, (int)n, item);
	return add_pair(m, spec, out, "iface", strlen("iface"), item, n);
}

static int compare_pairs(const void *a, const void *b)
{
	return strcmp(a, b); /* a pair begins with its key */
}

int dm_port_parse(struct dm_memory *m, const char *spec, struct dm_port_keys *out)
{
	const char *colon, *at;
	int err = 0;

	*out = (struct dm_port_keys){ .n = 0 };
	if (spec == NULL || *spec == '\0')
		return dm_fail(m, -EINVAL, GRAMMAR);
	if (strlen(spec) >= DM_PORT_SPEC_BYTES)
		return dm_fail(m, -EINVAL, "port \"%.40s...\" has %zu bytes: at most %d are possible", spec, strlen(spec), DM_PORT_SPEC_BYTES - 1);
	if (!dm_is_text(spec))
		return dm_fail(m, -EINVAL, "a port's name is UTF-8 without control characters");
	colon = strchrnul(spec, ':');
	if (!is_word(spec, (size_t)(colon - spec), DM_PORT_TRANSPORT_BYTES))
		return dm_fail(m, -EINVAL, "port \"%s\": \"%.*s\" is no transport: " GRAMMAR, spec, (int)(colon - spec), spec);
	memcpy(out->transport, spec, (size_t)(colon - spec));
	if (*colon == '\0' || colon[1] == '\0')
		return 0;
	for (at = colon + 1; err == 0; at++) {
		const size_t n = strcspn(at, ",");

		err = add_item(m, spec, out, at, n);
		at += n;
		if (*at == '\0')
			break;
	}
	if (err == 0)
		qsort(out->pairs, out->n, sizeof(out->pairs[0]), compare_pairs);
	return err;
}

/* ---- what was found ---- */

const char *dm_port_key(const struct dm_port_keys *keys, const char *key)
{
	for (uint32_t i = 0; i < keys->n; i++)
		if (strcmp(keys->pairs[i].key, key) == 0)
			return keys->pairs[i].value;
	return NULL;
}

int dm_port_key_u32(struct dm_memory *m, const struct dm_port_keys *keys, const char *key, uint32_t least, uint32_t most, uint32_t or_else,
		    uint32_t *out)
{
	const char *text = dm_port_key(keys, key);
	unsigned long long value;
	char *end;

	*out = or_else;
	if (text == NULL)
		return 0;
	value = strtoull(text, &end, 10);
	if (strspn(text, "0123456789") == 0 || *end != '\0' || strlen(text) > 10 || value < least || value > most)
		return dm_fail(m, -EINVAL, "%s port: %s=%s: a whole number from %u to %u belongs there", keys->transport, key, text, least, most);
	*out = (uint32_t)value;
	return 0;
}

static bool is_listed(const char *list, const char *word)
{
	const size_t n = strlen(word);

	for (const char *at = list; (at = strstr(at, word)) != NULL; at += n)
		if ((at == list || at[-1] == ' ') && (at[n] == '\0' || at[n] == ' '))
			return true;
	return false;
}

int dm_port_check_keys(struct dm_memory *m, const struct dm_port_keys *keys, const char *known)
{
	for (uint32_t i = 0; i < keys->n; i++)
		if (!is_listed(known, keys->pairs[i].key))
			return dm_fail(m, -EINVAL, "%s port: there is no key \"%s\": the keys are %s", keys->transport, keys->pairs[i].key, known);
	return 0;
}

int dm_port_canonical(struct dm_memory *m, const struct dm_port_keys *keys, char out[DM_PORT_SPEC_BYTES])
{
	int n = snprintf(out, DM_PORT_SPEC_BYTES, "%s:", keys->transport);

	for (uint32_t i = 0; i < keys->n && n < DM_PORT_SPEC_BYTES; i++)
		n += snprintf(out + n, (size_t)(DM_PORT_SPEC_BYTES - n), "%s%s=%s", i > 0 ? "," : "", keys->pairs[i].key, keys->pairs[i].value);
	if (n >= DM_PORT_SPEC_BYTES)
		return dm_fail(m, -EINVAL, "port \"%.40s...\" has %d bytes with all keys written out: at most %d are possible", out, n,
			       DM_PORT_SPEC_BYTES - 1);
	return 0;
}

/* FNV-1a of the canonical form. */
static uint32_t hash(const struct dm_port_keys *keys)
{
	uint32_t h = UINT32_C(0x811c9dc5);

	for (uint32_t i = 0; i < keys->n; i++)
		for (const char *s = keys->pairs[i].value; *s; s++)
			h = (h ^ (uint8_t)*s) * UINT32_C(0x01000193);
	return h;
}

int dm_port_name_of(struct dm_memory *m, const struct dm_port_keys *keys, char out[DM_PORT_NAME_BYTES])
{
	const char *name = dm_port_key(keys, "name"), *device = dm_port_key(keys, "iface");
	const char *path = dm_port_key(keys, "path");
	int n;

	if (name != NULL) {
		if (strlen(name) >= DM_PORT_NAME_BYTES || strspn(name, name_chars) != strlen(name))
			return dm_fail(m, -EINVAL, "%s port: name=%s: letters, digits, '_', '.' and '-', at most %d of them", keys->transport, name,
				       DM_PORT_NAME_BYTES - 1);
		strcpy(out, name);
		return 0;
	}
	if (device == NULL && path != NULL)
		device = strrchr(path, '/') != NULL ? strrchr(path, '/') + 1 : path;
	if (device == NULL) {
		snprintf(out, DM_PORT_NAME_BYTES, "%s", keys->transport);
		return 0;
	}
	n = snprintf(out, DM_PORT_NAME_BYTES, "%s_%s", keys->transport, device);
	if (n >= DM_PORT_NAME_BYTES || strspn(out, derived_chars) != strlen(out))
		snprintf(out, DM_PORT_NAME_BYTES, "%s_%07x", keys->transport, hash(keys) & 0xfffffff);
	return 0;
}
