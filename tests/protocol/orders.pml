/* The legal orders of calls that are checked, the same on all ranks. Chosen by -DORDER=ORDER_<name>.
   A call is two digits, half and round (an initialiser takes no expressions). Rounds 0 .. 4 at depth 2: both slots are
   used again, slot 0 twice. */
#define DS(e) 0##e
#define DR(e) 1##e
#define CS(e) 2##e
#define CR(e) 3##e
#define half(call) ((call) / 10)
#define round(call) ((call) % 10)

#define ORDER_plain 1
#define ORDER_dispatch_only 2
#define ORDER_two_batches 3
#define ORDER_staggered 4
#define ORDER_ahead 5
#define ORDER_mixed 6
#define ORDER_swapped 7

#if ORDER == ORDER_plain
#define CALLS 20
hidden byte calls[CALLS] = {
    DS(0), DR(0), CS(0), CR(0), DS(1), DR(1), CS(1), CR(1), DS(2), DR(2), CS(2), CR(2),
    DS(3), DR(3), CS(3), CR(3), DS(4), DR(4), CS(4), CR(4) };

#elif ORDER == ORDER_dispatch_only /* never combined: the empty combine closes the rounds */
#define CALLS 10
hidden byte calls[CALLS] = { DS(0), DR(0), DS(1), DR(1), DS(2), DR(2), DS(3), DR(3), DS(4), DR(4) };

#elif ORDER == ORDER_two_batches /* two micro-batches, their halves interleaved by hooks */
#define CALLS 20
hidden byte calls[CALLS] = {
    DS(0), DS(1), DR(0), CS(0), DR(1), CS(1), CR(0), CR(1), DS(2), DS(3), DR(2), CS(2), DR(3), CS(3), CR(2), CR(3),
    DS(4), DR(4), CS(4), CR(4) };

#elif ORDER == ORDER_staggered /* the next round is sent before the experts of this one run, and combine overlaps it */
#define CALLS 20
hidden byte calls[CALLS] = {
    DS(0), DS(1), DR(0), CS(0), DR(1), CR(0), DS(2), CS(1), CR(1), DR(2), DS(3), CS(2), DR(3), CR(2), DS(4), CS(3),
    DR(4), CR(3), CS(4), CR(4) };

#elif ORDER == ORDER_ahead /* never combined, and sent one round ahead of the receive */
#define CALLS 10
hidden byte calls[CALLS] = { DS(0), DS(1), DR(0), DS(2), DR(1), DS(3), DR(2), DS(4), DR(3), DR(4) };

#elif ORDER == ORDER_mixed /* rounds 0, 3 and 4 are not combined, and round 2 is combined late */
#define CALLS 14
hidden byte calls[CALLS] = {
    DS(0), DR(0), DS(1), DR(1), CS(1), CR(1), DS(2), DR(2), DS(3), DR(3), CS(2), CR(2), DS(4), DR(4) };

#elif ORDER == ORDER_swapped /* halves of two open rounds in the other order, round 3 received only after round 4 */
#define CALLS 20
hidden byte calls[CALLS] = {
    DS(0), DS(1), DR(1), DR(0), CS(1), CS(0), CR(0), CR(1), DS(2), DS(3), DR(2), CS(2), CR(2), DS(4), DR(4), CS(4),
    DR(3), CS(3), CR(4), CR(3) };
#endif
