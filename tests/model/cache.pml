/* cache.pml - the protocol of a lane's cache (native/cache.h, native/cache.c, native/lane.c), for spin(1): every interleaving, every death.
 *
 * A lane takes blocks out of its cache and puts them back with plain stores; another empties the cache under the heap's lock; a
 * third takes and gives memory under the lock, takes the lock over from the dead, and reaps the lane. The lane and the one that
 * empties may be killed before any statement. The lane's stores go through a store buffer, first in first out, as on x86; the
 * barrier of membarrier(2) waits until it is empty.
 * With -DHAND_OVER the lane's thread works once and ends without having emptied its cache, as beside a stopped holder of the lock; then
 * a thread of another process claims the lane, empties under the lock what it finds there, and works. It may be killed anywhere; the
 * reaper marks the lane DEAD and empties the cache under the lock, entry by entry.
 * Checked: no store ever hands out a block that is not the cache's any more, and none takes back what is not the lane's
 * (the assertions in `apply`); at the end every block is accounted for; nobody waits for ever (no invalid end state).
 * These must fail: -DNO_BARRIER leaves the barrier out, -DNO_CHECK lets who goes on with an emptying trust the entries,
 * -DALWAYS_SETTLE lets it empty a cache although nobody had looked yet whether its lane is inside. With HAND_OVER, -DNO_FLUSH lets the
 * claimer use the entries as they are, -DFORGET lets the reaper drop the entries of a dead lane instead of giving them back. */

#define N 2 /* blocks, all cached at first */
#define FREE 0
#define CACHED 1
#define USED 2
#define OTHER 3 /* handed out by the heap, to somebody else */
#define CACHED_NEXT 4 /* as CACHED, by the next process that has the lane */
#define is_cached(w) (w == CACHED || w == CACHED_NEXT)

#define NONE 0 /* drain */
#define ASKED 1
#define EMPTYING 2

#define NOBODY 0
#define LANE 1
#define EMPTIER 2
#define THIRD 3

#define LANE_FREE 0 /* lane */
#define LANE_LIVE 1
#define LANE_CLAIMED 2 /* by the next process */
#define LANE_NEXT 3
#define LANE_DEAD 4

mtype = { BUSY, COUNT, WORD, ENTRY };

byte word[N] = CACHED;
byte entry[N];
byte n = N;
bit busy;
byte drain = NONE;
byte lane = LANE_LIVE;
byte lock = NOBODY;
bool dead[4], finished[4], reaped;
byte n_pending; /* stores to n that are in the buffer */
chan buffer = [8] of { mtype, byte, byte };

inline apply(what, at, value)
{
	if
	:: what == BUSY -> busy = value
	:: what == COUNT -> n = value; n_pending--
	:: what == ENTRY -> entry[at] = value
	:: what == WORD ->
		assert(value == USED -> is_cached(word[at]) : word[at] == USED);
		word[at] = value
	fi
}

/* The lane's CPU: what was stored becomes visible in order, also after the thread has died. */
active proctype Cpu()
{
	mtype what; byte at, value;
end:	do
	:: atomic { buffer?what, at, value -> apply(what, at, value) }
	od
}

/* Whoever has the lock, and knows that nobody is inside. */
inline empty_cache()
{
	do
	:: n > 0 ->
		if
		:: is_cached(word[entry[n - 1]]) -> word[entry[n - 1]] = FREE
		:: else
		fi;
		n--
	:: n == 0 -> break
	od
}

inline settle()
{
	if
	:: drain == EMPTYING ->
#ifdef NO_CHECK
		do
		:: n > 0 -> assert(is_cached(word[entry[n - 1]])); word[entry[n - 1]] = FREE; n-- /* else freed twice */
		:: n == 0 -> break
		od;
#else
		empty_cache();
#endif
		drain = NONE
#ifdef ALWAYS_SETTLE
	:: drain == ASKED ->
		empty_cache();
		drain = NONE
#else
	:: drain == ASKED -> drain = NONE
#endif
	:: else
	fi
}

/* A locked instruction: the caller's own buffer is empty afterwards, which matters for the lane only. */
inline acquire(me)
{
	if
	:: atomic { lock == NOBODY -> lock = me }
	:: atomic { lock != NOBODY && lock != me && dead[lock] -> lock = me }; settle()
	fi
}

/* One operation of the lane's thread. */
inline operate(cached)
{
	buffer!BUSY, 0, 1;
	if
	:: drain != NONE -> /* the long way */
		buffer!BUSY, 0, 0;
		empty(buffer);
		acquire(LANE);
		lock = NOBODY
	:: else ->
		k = (n_pending > 0 -> k : n); /* its own store, if that is still in the buffer */
		if
		:: k > 0 -> /* pop */
			e = entry[k - 1]; k--;
			atomic { n_pending++; buffer!COUNT, 0, k };
			buffer!WORD, e, USED;
			has[e] = true
		:: k < N && (has[0] || has[1]) -> /* push */
			if
			:: has[0] -> e = 0
			:: has[1] -> e = 1
			fi;
			buffer!WORD, e, cached;
			buffer!ENTRY, k, e; k++;
			atomic { n_pending++; buffer!COUNT, 0, k };
			has[e] = false;
			empty(buffer) /* the entry is read through the memory above */
		:: k == 0 && !has[0] && !has[1]
		fi;
		buffer!BUSY, 0, 0
	fi
}

#ifdef HAND_OVER
/* What the first user has taken is its own for good. FREE becomes visible after all that it stored. */
inline end_without_a_flush()
{
	atomic {
		empty(buffer);
		if :: has[0] -> word[0] = OTHER; has[0] = false :: else fi;
		if :: has[1] -> word[1] = OTHER; has[1] = false :: else fi;
		lane = LANE_FREE
	}
}

inline claim()
{
	lane = LANE_CLAIMED;
	busy = 0;
	lane = LANE_NEXT;
#ifndef NO_FLUSH
	if
	:: n == 0
	:: n > 0 -> acquire(LANE); empty_cache(); lock = NOBODY
	fi
#endif
}

#endif
proctype Lane()
{
	byte k, e, turns; bool has[N];
#ifdef HAND_OVER
	operate(CACHED);
	end_without_a_flush();
	{
		claim();
		do
		:: turns < 2 -> turns++; operate(CACHED_NEXT)
		:: turns == 2 -> break
		od;
		finished[LANE] = true
	} unless { dead[LANE] }
#else
	{
		do
		:: turns < 3 -> turns++; operate(CACHED)
		:: turns == 3 -> break
		od;
		finished[LANE] = true
	} unless { dead[LANE] }
#endif
}

proctype Emptier()
{
	byte turns, was;
	{
		do
		:: turns < 2 ->
			turns++;
			acquire(EMPTIER);
			was = lane;
			if
			:: was == LANE_CLAIMED || was == LANE_DEAD -> goto leave
			:: else
			fi;
			drain = ASKED;
#ifndef NO_BARRIER
			empty(buffer);
#endif
			if
			:: busy == 0 && lane == was ->
				drain = EMPTYING;
				empty_cache()
			:: else
			fi;
			drain = NONE;
leave:			lock = NOBODY
		:: turns == 2 -> break
		od;
		finished[EMPTIER] = true
	} unless { dead[EMPTIER] }
}

/* Everybody else, and the reaper. */
proctype Third()
{
	byte i, turns;
	do
	:: turns < 2 ->
		turns++;
		acquire(THIRD);
		i = 0;
		do
		:: i < N && word[i] == FREE -> word[i] = OTHER; i++
		:: i < N && word[i] == OTHER -> word[i] = FREE; i++
#ifdef HAND_OVER
		:: i < N && word[i] == CACHED && lane != LANE_LIVE -> word[i] = FREE; i++ /* the first user's process died: its reaper */
#endif
		:: i < N && (is_cached(word[i]) || word[i] == USED) -> i++
		:: i == N -> break
		od;
		lock = NOBODY
	:: turns == 2 -> break
	od;
	(dead[LANE] || finished[LANE]) && (dead[EMPTIER] || finished[EMPTIER]) && empty(buffer);
	acquire(THIRD); /* as sweep_locks() does */
	assert(drain == NONE);
	if
	:: dead[LANE] -> /* empties the cache, frees what words name the dead */
		lane = LANE_DEAD;
#ifdef FORGET
		n = 0;
#else
		empty_cache();
#endif
		busy = 0; i = 0;
		do
		:: i < N ->
			if
#ifdef HAND_OVER
			:: word[i] == CACHED_NEXT || word[i] == USED -> word[i] = FREE
#else
			:: word[i] == CACHED || word[i] == USED -> word[i] = FREE
#endif
			:: else
			fi;
			assert(!is_cached(word[i])); /* nor what another's thread had left in the lane: nobody would find it any more */
			i++
		:: i == N -> break
		od
	:: else -> /* the law of types.h: what words call cached is what is entered */
		byte cached = 0; i = 0;
		do
		:: i < N -> cached = cached + (is_cached(word[i]) -> 1 : 0); i++
		:: i == N -> break
		od;
		assert(cached == n)
	fi;
	lock = NOBODY;
	reaped = true
}

proctype Killer(byte victim)
{
	if
#ifdef HAND_OVER
	:: atomic { !finished[victim] && (victim != LANE || lane == LANE_CLAIMED || lane == LANE_NEXT) -> dead[victim] = true }
#else
	:: atomic { !finished[victim] -> dead[victim] = true }
#endif
	:: true
	fi
}

init
{
	atomic {
		entry[0] = 0; entry[1] = 1;
		run Lane(); run Emptier(); run Third(); run Killer(LANE); run Killer(EMPTIER)
	}
}
