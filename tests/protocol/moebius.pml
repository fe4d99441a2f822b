/* The protocol of a round (dispatch send DS, dispatch receive DR, combine send CS, combine receive CR) between R ranks with
   D slots, any of which may stop for good at any point. docs/protocol-model.md says what is modelled and what it taught.

   Options: -DR=2|3  -DORDER=ORDER_<name>  -DSTOPS=<ranks that may stop>  -DHEARSAY  -DANY_ROWS
   Mutations, each of which the check must refute: NO_CLOSING NO_EMPTY_COMBINE NO_EPOCH NO_ABORT, and the failure rules
   that do not work: LEAVE_AT_ONCE COMBINE_AT_ONCE NO_DRAIN.                                                        */
#ifndef R
#define R 2
#endif
#ifndef D
#define D 2
#endif
#ifndef STOPS
#define STOPS 1
#endif
#ifndef ORDER
#define ORDER ORDER_plain
#endif
#include "orders.pml"

#define bit(x) (1 << (x))
#define low(m) (((m) & 1) -> 0 : (((m) & 2) -> 1 : (((m) & 4) -> 2 : 3))) /* the lowest rank in a set */
#define rest(m) ((m) & ((m) - 1))                                      /* the set without it */
#define size(m) (((m) & 1) + (((m) >> 1) & 1) + (((m) >> 2) & 1) + (((m) >> 3) & 1))
#define everyone (bit(R) - 1)
#define me (_pid - 1)
#define others (everyone & ~bit(me) & ~dead)

/* A signal word: the epoch, and how many rows (none, some), or the rank that broke the round. Compared, never cleared. */
#define EMPTY 0
#define ROWS 1
#define ABORT 2 /* + the rank to blame */
#define EXPIRED 7
#define pack(e, code) (((e) + 1) * 8 + (code))
#define epoch_of(w) ((w) >> 3)

#define DISPATCH 0
#define COMBINE 1
#define slot(e) ((e) % D)
#define at(kind, dst, e, src) ((((kind) * R + (dst)) * D + slot(e)) * R + (src))
byte word[2 * R * D * R];

/* Cells. Dispatch: one per source; it holds the epoch and the row of the source's combine inbox that the reply goes to.
   Combine: rows that the owner hands out to those it sent to, so that the writer of a row differs from round to round;
   a row holds the epoch and its writer. */
#define cell(dst, e, src) (((dst) * D + slot(e)) * R + (src))
#define row(dst, e, r) (((dst) * D + slot(e)) * R + (r))
#define reply_base(sent_to, dst) size((sent_to) & (bit(dst) - 1))
#define message(e, base) (((e) + 1) * 4 + (base))
#define answer(e, src) (((e) + 1) * 4 + (src))
byte inbox[R * D * R];
byte replies[R * D * R];
byte sent_to[R * D]; /* whom a rank has sent rows to in the round of the slot */

byte stopped; /* ranks that have stopped for good */
byte done;    /* ranks that have finished their order */
byte rows;    /* who sends rows to whom: 0 nobody, 1 everybody, 2 some */
bool token_major;

#define some_rows(src, dst, e) (((src) + 2 * (dst) + (e)) % 3 != 0)
#define has_rows(dst, e) (rows == 1 || (rows == 2 && some_rows(me, dst, e)))

/* What a rank keeps of the round in a slot. */
#define COMBINED 1 /* the combine signals of the round are sent, full, empty or broken */
#define LOST 2     /* the round is lost: its remaining halves are skipped */
#define UNHEARD 4  /* lost before its dispatch signals were heard */

#define here(kind, src, e) (epoch_of(word[at(kind, me, e, src)]) >= (e) + 1)
#ifdef NO_EPOCH
#define ready(kind, src, e) (word[at(kind, me, e, src)] != 0 || (stopped & bit(src)))
#else
#define ready(kind, src, e) (here(kind, src, e) || (stopped & bit(src)))
#endif

/* A wait ends in one of four ways: rows, none, the round broken by its sender, or the deadline (never for a live rank). */
inline hear(kind, src, e) {
    code = word[at(kind, me, e, src)];
#ifdef NO_EPOCH
    code = (code -> code & 7 : EXPIRED);
#else
    assert(epoch_of(code) <= (e) + 1); /* newer than expected: protocol error */
    code = (epoch_of(code) == (e) + 1 -> code & 7 : EXPIRED);
#endif
    news = 0;
    if
    :: code == EXPIRED -> learn(src)
    :: code >= ABORT && code < EXPIRED -> learn(code - ABORT)
    :: else
    fi
}

inline learn(culprit) {
    assert(stopped & bit(culprit)); /* no live rank is ever given up */
    news = !(dead & bit(culprit));
    dead = dead | bit(culprit);
    why = culprit + 1
}

inline put(kind, dst, e, code_) { word[at(kind, dst, e, me)] = pack(e, code_) }

/* Any failure detector: whoever waits may come to know of a stopped rank in another way than by its own deadline. */
#ifdef HEARSAY
#define hearsay(set, blame) \
    :: atomic { (set) && (stopped & ~dead & everyone) -> why = low(stopped & ~dead & everyone) + 1; dead = dead | bit(why - 1); \
                blame = why; why = 0 }
#else
#define hearsay(set, blame)
#endif

/* Waits of the dispatch send for the round that had the slot before. Abort codes count as signals; news breaks the new round. */
inline close_wait(kind, e) {
    todo = others;
    do
    :: atomic { todo && ready(kind, low(todo), e) ->
        hear(kind, low(todo), e);
        blame = (news -> why : blame);
        todo = rest(todo) & ~dead;
#ifdef LEAVE_AT_ONCE
        todo = (blame -> 0 : todo);
#endif
        code = 0; why = 0; news = 0 }
    hearsay(todo, blame)
    :: !todo -> break
    od
}

proctype rank() provided (!(stopped & bit(me)))
{
    byte pc, e, todo, code, why, blame, dead;
    bit news;
    byte state[D];
    byte got[D * R]; /* 1 + reply row of the message that a source sent */

    do
    :: atomic { pc == CALLS -> done = done | bit(me); break }

    /* the remaining halves of a lost round */
    :: atomic { pc < CALLS && half(calls[pc]) > 0 && (state[slot(round(calls[pc]))] & LOST) -> pc++ }

    /* dispatch send */
    :: atomic { pc < CALLS && half(calls[pc]) == 0 -> e = round(calls[pc]); todo = others };
        if
        :: e >= D ->
#ifdef NO_EMPTY_COMBINE
            if
            :: !(state[slot(e)] & COMBINED) -> goto closed
            :: else
            fi;
#endif
#ifndef NO_DRAIN
            /* a lost round whose dispatch signals were not heard: our combine signal may only follow them */
            if
            :: state[slot(e)] & UNHEARD -> close_wait(DISPATCH, e - D); todo = others
            :: else
            fi;
#endif
            /* never combined: the empty combine */
            do
            :: atomic { todo && !(state[slot(e)] & COMBINED) ->
                assert(!token_major || !got[slot(e) * R + low(todo)]
                    || inbox[cell(me, e, low(todo))] == message(e - D, got[slot(e) * R + low(todo)] - 1));
                put(COMBINE, low(todo), e - D, EMPTY); todo = rest(todo) }
            :: else -> break
            od;
#ifndef NO_CLOSING
            close_wait(COMBINE, e - D)
#endif
        :: else
        fi;
closed:
        atomic {
            todo = others; state[slot(e)] = 0; sent_to[me * D + slot(e)] = 0;
            code = 0;
            do
            :: code < R -> got[slot(e) * R + code] = 0;
                if
                :: !blame && (todo & bit(code)) && has_rows(code, e) ->
                    sent_to[me * D + slot(e)] = sent_to[me * D + slot(e)] | bit(code)
                :: else
                fi;
                code++
            :: else -> break
            od;
            code = 0
        }
#ifdef ANY_ROWS
        atomic {
            if
            :: !blame -> sent_to[me * D + slot(e)] = 0
            :: !blame -> sent_to[me * D + slot(e)] = todo
            :: !blame -> sent_to[me * D + slot(e)] = bit(low(todo)) & todo
            :: !blame -> sent_to[me * D + slot(e)] = rest(todo)
            :: blame
            fi
        }
#endif
        do
        :: atomic { todo && (sent_to[me * D + slot(e)] & bit(low(todo))) ->
                inbox[cell(low(todo), e, me)] = message(e, reply_base(sent_to[me * D + slot(e)], low(todo))) };
            atomic { put(DISPATCH, low(todo), e, ROWS); todo = rest(todo) }
        :: atomic { todo && !(sent_to[me * D + slot(e)] & bit(low(todo))) ->
                put(DISPATCH, low(todo), e, (blame -> ABORT + blame - 1 : EMPTY)); todo = rest(todo) }
        :: atomic { !todo -> 
                if
                :: blame -> state[slot(e)] = LOST | UNHEARD
                :: else
                fi;
#ifdef COMBINE_AT_ONCE
                todo = (blame -> others : 0);
#else
                blame = 0;
#endif
                pc++; break }
        od;
#ifdef COMBINE_AT_ONCE
        do
        :: atomic { todo -> state[slot(e)] = LOST | COMBINED; put(COMBINE, low(todo), e, ABORT + blame - 1); todo = rest(todo) }
        :: atomic { !todo -> blame = 0; break }
        od;
#endif
        e = 0

    /* dispatch receive */
    :: atomic { pc < CALLS && half(calls[pc]) == 1 && !(state[slot(round(calls[pc]))] & LOST) -> e = round(calls[pc]); todo = others };
        do
        :: atomic { todo && ready(DISPATCH, low(todo), e) ->
                hear(DISPATCH, low(todo), e);
                if
                :: code <= ROWS ->
                    assert((code == ROWS) == ((sent_to[low(todo) * D + slot(e)] & bit(me)) != 0));
                :: else -> blame = why
                fi;
                if
                :: code == ROWS -> /* reading begins */
                    assert(inbox[cell(me, e, low(todo))] / 4 == e + 1 && !got[slot(e) * R + low(todo)]);
                    got[slot(e) * R + low(todo)] = 1 + inbox[cell(me, e, low(todo))] % 4
                :: else
                fi;
                if
                :: code != ROWS || token_major -> todo = rest(todo) & ~dead
                :: else
                fi;
#ifdef LEAVE_AT_ONCE
                todo = (blame -> 0 : todo);
#endif
                why = 0; news = 0 };
            atomic {
                if
                :: code == ROWS && !token_major -> /* reading ends */
                    assert(inbox[cell(me, e, low(todo))] == message(e, got[slot(e) * R + low(todo)] - 1));
                    todo = rest(todo)
                :: else
                fi;
                code = 0 }
        hearsay(todo, blame)
        :: atomic { !todo ->
                if
                :: blame -> state[slot(e)] = LOST; todo = others
                :: else
                fi;
                pc++; break }
        od;
#ifdef NO_ABORT
        todo = 0;
#endif
        do /* abort on: the combine signals of a round lost here */
        :: atomic { todo -> state[slot(e)] = LOST | COMBINED; put(COMBINE, low(todo), e, ABORT + blame - 1); todo = rest(todo) }
        :: atomic { !todo -> blame = 0; e = 0; break }
        od

    /* combine send */
    :: atomic { pc < CALLS && half(calls[pc]) == 2 && !(state[slot(round(calls[pc]))] & LOST) ->
            e = round(calls[pc]); todo = others; state[slot(e)] = COMBINED };
        do
        :: atomic { todo && got[slot(e) * R + low(todo)] ->
                /* token_major: reading ends */
                assert(!token_major || inbox[cell(me, e, low(todo))] == message(e, got[slot(e) * R + low(todo)] - 1));
                replies[row(low(todo), e, got[slot(e) * R + low(todo)] - 1)] = answer(e, me) };
            atomic { put(COMBINE, low(todo), e, ROWS); got[slot(e) * R + low(todo)] = 0; todo = rest(todo) }
        :: atomic { todo && !got[slot(e) * R + low(todo)] -> put(COMBINE, low(todo), e, EMPTY); todo = rest(todo) }
        :: atomic { !todo -> pc++; e = 0; break }
        od

    /* combine receive: of those that owe rows, the dead included (looked at once) */
    :: atomic { pc < CALLS && half(calls[pc]) == 3 && !(state[slot(round(calls[pc]))] & LOST) ->
            e = round(calls[pc]); todo = sent_to[me * D + slot(e)] };
        do
        :: atomic { todo && ready(COMBINE, low(todo), e) ->
                hear(COMBINE, low(todo), e);
                assert(code != EMPTY); /* they owe rows */
                if
                :: code == ROWS -> /* reading begins */
                    assert(replies[row(me, e, reply_base(sent_to[me * D + slot(e)], low(todo)))] == answer(e, low(todo)))
                :: else -> state[slot(e)] = state[slot(e)] | LOST; todo = rest(todo);
                    if
                    :: todo = 0 /* leave at once ... */
                    :: todo /* ... or look at the others too: both must do */
                    fi
                fi;
                why = 0; news = 0 };
            atomic {
                if
                :: code == ROWS -> /* reading ends */
                    assert(replies[row(me, e, reply_base(sent_to[me * D + slot(e)], low(todo)))] == answer(e, low(todo)));
                    todo = rest(todo)
                :: else
                fi;
                code = 0 }
        :: atomic { !todo -> pc++; e = 0; break }
        od
    od
}

init {
    byte left = STOPS;
    atomic {
        if
        :: rows = 0
        :: rows = 1
        :: rows = 2
        fi;
        if
        :: token_major = 0
        :: token_major = 1
        fi;
        left = 0;
        do
        :: left < R -> run rank(); left++
        :: else -> break
        od;
        left = STOPS
    };
    do
    :: atomic { left > 0 ->
        if
        :: !(stopped & 1) -> stopped = stopped | 1
        :: !(stopped & 2) -> stopped = stopped | 2
#if R > 2
        :: !(stopped & 4) -> stopped = stopped | 4
#endif
#if R > 3
        :: !(stopped & 8) -> stopped = stopped | 8
#endif
        fi;
        left-- }
    :: atomic { left = 0; break }
    od;
    timeout; /* nothing can move */
    assert((done | stopped) == everyone) /* and every rank that lives has ended */
}
