/* The life of a round (dispatch send DS, dispatch receive DR, combine send CS, combine receive CR) on R ranks with D
   slots; a rank may stop for good at any point. docs/protocol-model.md says what is modelled and what it taught.

   Options: -DR=2|3 -DORDER=ORDER_<name> -DSTOPS=<ranks that may stop> -DHEARSAY -DANY_ROWS
   Mutations, each to be refuted: NO_CLOSING NO_EMPTY_COMBINE NO_EPOCH NO_ABORT NO_OVERTAKE NO_LOOK_AT_DEAD. */
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
#define low(m) (((m) & 1) -> 0 : (((m) & 2) -> 1 : 2)) /* the lowest rank in a set: receives go in this order */
#define rest(m) ((m) & ((m) - 1))                      /* the set without it */
#define size(m) (((m) & 1) + (((m) >> 1) & 1) + (((m) >> 2) & 1))
#define neighbour ((me + 1) % R)
#define near(m) ((me + 1 + !((m) & bit(neighbour))) % R) /* sends begin with the neighbour */
#define far(m) ((m) & ~bit(near(m)))
#define everyone (bit(R) - 1)
#define me (_pid - 1)
#define others (everyone & ~bit(me) & ~dead)

/* A signal word: the epoch, and whether rows come with it, or which rank broke the round. Compared, never cleared. */
#define EMPTY 0
#define ROWS 1
#define ABORT 2 /* + the rank to blame */
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

#define here(kind, src, e) (epoch_of(word[at(kind, me, e, src)]) >= (e) + 1)
#ifdef NO_EPOCH
#define ready(kind, src, e) (word[at(kind, me, e, src)] != 0 || (stopped & bit(src)))
#else
#define ready(kind, src, e) (here(kind, src, e) || (stopped & bit(src)))
#endif

/* A wait ends with rows, with none, with an abort, or by the deadline (never for a live rank), which reads as if the
   awaited rank blamed itself. A newer word is an error, unless it is an abort, for an abort waits for no reader. */
#define expired(src) (ABORT + (src))
#define is_abort(w) (((w) & 7) >= ABORT)
#ifdef NO_OVERTAKE
#define may_overtake(w) 0
#else
#define may_overtake(w) is_abort(w)
#endif
inline hear(kind, src, e) {
    code = word[at(kind, me, e, src)];
#ifdef NO_EPOCH
    code = (code -> code & 7 : expired(src))
#else
    assert(epoch_of(code) <= (e) + 1 || may_overtake(code)); /* newer than expected: protocol error */
    code = (epoch_of(code) >= (e) + 1 -> code & 7 : expired(src))
#endif
}

/* The round is lost, and who is to blame given up. */
inline blame_for_it(culprit) {
    blame = culprit;
    assert(stopped & bit(blame)); /* no live rank is ever given up */
    dead = dead | bit(blame);
    code = 0
}

inline put(kind, dst, e, code_) { word[at(kind, dst, e, me)] = pack(e, code_) }

/* Any failure detector: whoever waits may learn of a stopped rank otherwise than by its own deadline on it. */
#ifdef HEARSAY
#define stranger low(stopped & ~dead & everyone)
#define hearsay(next) :: atomic { stopped & ~dead & everyone -> blame_for_it(stranger); goto next }
#else
#define hearsay(next)
#endif

/* What a rank keeps of a round, by slot. */
#define COMBINED 1 /* the combine signals of the round are sent, full, empty or broken */
#define LOST 2     /* the round is lost: its remaining halves are skipped */

#define mine state[slot(e)]
#define sent sent_to[me * D + slot(e)]
#define message_of(src) got[slot(e) * R + (src)]
#define my_cell(src) inbox[cell(me, e, src)]
#define my_row(src) replies[row(me, e, reply_base(sent, src))]

/* Every atomic below is one step that others can see, with the local work up to the next: a step ends before an access
   to shared memory, and wherever a wait may block. `todo`: the ranks that a half has still to signal or to hear. */
proctype rank() provided (!(stopped & bit(me)))
{
    byte pc, e, todo, code, blame, dead;
    byte heard; /* in combine receive: whose rows are read */
    byte state[D];
    byte got[D * R]; /* 1 + reply row of the message that a source sent */

next:
    atomic {
        code = 0; blame = 0; heard = 0; e = 0;
        do /* skip the remaining halves of a lost round */
        :: pc < CALLS && half(calls[pc]) > 0 && (state[slot(round(calls[pc]))] & LOST) -> pc++
        :: else -> break
        od;
        if
        :: pc == CALLS -> todo = 0; done = done | bit(me); goto end
        :: else
        fi;
        e = round(calls[pc]);
        todo = others;
        pc++;
        if
        :: half(calls[pc - 1]) == 0 ->
            if
            :: e < D || !todo -> goto open
#ifdef NO_EMPTY_COMBINE
            :: e >= D && todo && !(mine & COMBINED) -> goto open
#endif
            :: else -> goto blank
            fi
        :: half(calls[pc - 1]) == 1 -> if :: todo -> goto receive :: else -> goto next fi
        :: half(calls[pc - 1]) == 2 -> mine = COMBINED; if :: todo -> goto reply :: else -> goto next fi
        :: half(calls[pc - 1]) == 3 -> todo = sent;
#ifdef NO_LOOK_AT_DEAD
            todo = todo & ~dead;
#endif
            if :: todo -> goto collect :: else -> goto collected fi
        fi
    };

    /* ---- dispatch send ---- */
blank: /* a round that was never combined: the empty combine. What is left of the round is read no more. */
    atomic { if :: (mine & COMBINED) -> goto close :: else fi };
    do
    :: atomic {
        assert(!token_major || !message_of(near(todo))
            || my_cell(near(todo)) == message(e - D, message_of(near(todo)) - 1));
        put(COMBINE, near(todo), e - D, EMPTY);
        todo = far(todo);
        if :: !todo -> todo = others; goto close :: else fi }
    od;

close: /* the closing rule: everybody's combine signal of the round that had the slot; any abort will do */
#ifdef NO_CLOSING
    atomic { goto open };
#endif
    do
    :: atomic { ready(COMBINE, low(todo), e - D) ->
        hear(COMBINE, low(todo), e - D);
        if :: code == expired(low(todo)) -> blame_for_it(code - ABORT); goto lose :: else fi;
        code = 0;
        todo = rest(todo);
        if :: !todo -> goto open :: else fi }
    hearsay(lose)
    od;

lose: /* not sent yet: nobody shall wait for it */
    atomic { mine = LOST; todo = others; if :: !todo -> goto next :: else fi };
    do
    :: atomic {
        put(DISPATCH, near(todo), e, ABORT + blame);
        todo = far(todo);
        if :: !todo -> todo = others; goto abort :: else fi }
    od;

open:
    atomic {
        todo = others; sent = 0; mine = 0;
        do
        :: code < R ->
            message_of(code) = 0;
            if
            :: (todo & bit(code)) && has_rows(code, e) -> sent = sent | bit(code)
            :: else
            fi;
            code++
        :: else -> code = 0; break
        od;
#ifdef ANY_ROWS
        if
        :: sent = 0
        :: sent = todo
        :: sent = bit(low(todo)) & todo
        :: sent = rest(todo)
        fi;
#endif
        if :: !todo -> goto next :: else fi
    };
    do
    :: atomic { sent & bit(near(todo)) -> inbox[cell(near(todo), e, me)] = message(e, reply_base(sent, near(todo))) };
       atomic { put(DISPATCH, near(todo), e, ROWS); todo = far(todo); if :: !todo -> goto next :: else fi }
    :: atomic { !(sent & bit(near(todo))) ->
        put(DISPATCH, near(todo), e, EMPTY); todo = far(todo); if :: !todo -> goto next :: else fi }
    od;

    /* ---- dispatch receive ---- */
receive:
    do
    :: atomic { ready(DISPATCH, low(todo), e) ->
        hear(DISPATCH, low(todo), e);
        if
        :: code >= ABORT -> blame_for_it(code - ABORT); goto abort
        :: else -> assert((code == ROWS) == ((sent_to[low(todo) * D + slot(e)] & bit(me)) != 0))
        fi;
        if
        :: code == ROWS -> /* reading begins */
            assert(my_cell(low(todo)) / 4 == e + 1 && !message_of(low(todo)));
            message_of(low(todo)) = 1 + my_cell(low(todo)) % 4
        :: else
        fi;
        if
        :: code == ROWS && !token_major
        :: else ->
            code = 0;
            todo = rest(todo);
            if :: !todo -> goto next :: else -> goto receive fi
        fi };
       atomic { /* reading ends */
        assert(my_cell(low(todo)) == message(e, message_of(low(todo)) - 1));
        code = 0;
        todo = rest(todo);
        if :: !todo -> goto next :: else fi }
    hearsay(abort)
    od;

abort: /* the combine signals of a lost round */
    atomic { mine = LOST; todo = others;
#ifdef NO_ABORT
        goto next;
#endif
        mine = LOST | COMBINED; if :: !todo -> goto next :: else fi };
    do
    :: atomic {
        put(COMBINE, near(todo), e, ABORT + blame);
        todo = far(todo);
        if :: !todo -> goto next :: else fi }
    od;

    /* ---- combine send ---- */
reply:
    do
    :: atomic { message_of(near(todo)) -> /* token_major: reading ends */
        assert(!token_major || my_cell(near(todo)) == message(e, message_of(near(todo)) - 1));
        replies[row(near(todo), e, message_of(near(todo)) - 1)] = answer(e, me) };
       atomic {
        put(COMBINE, near(todo), e, ROWS); message_of(near(todo)) = 0; todo = far(todo);
        if :: !todo -> goto next :: else fi }
    :: atomic { !message_of(near(todo)) ->
        put(COMBINE, near(todo), e, EMPTY); todo = far(todo); if :: !todo -> goto next :: else fi }
    od;

    /* ---- combine receive: from those that owe rows, the dead included (looked at once) ---- */
collect:
    do
    :: atomic { ready(COMBINE, low(todo), e) ->
        hear(COMBINE, low(todo), e);
        if :: code >= ABORT -> blame_for_it(code - ABORT); mine = mine | LOST; goto next :: else fi;
        assert(code == ROWS && my_row(low(todo)) == answer(e, low(todo))); /* they owe rows; reading begins */
        code = 0; heard = heard | bit(low(todo)); todo = rest(todo);
        if :: !todo -> goto collected :: else fi }
    hearsay(unheard)
    od;
unheard:
    atomic { mine = mine | LOST; goto next };
collected: /* a round that is not lost has an answer to every row; all are read together, and reading ends */
    atomic {
        assert(heard == sent);
        do
        :: code < R -> assert(!(sent & bit(code)) || my_row(code) == answer(e, code)); code++
        :: else -> break
        od;
        goto next
    };
end:
    skip
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
        fi;
        left-- }
    :: atomic { left = 0; break }
    od;
    timeout; /* nothing can move */
    assert((done | stopped) == everyone) /* and every rank that lives has ended */
}
