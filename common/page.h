/* The control page: one per agent, shared with the engine that is attached to it.
 *
 * It belongs to the agent and survives the engine.  All words are 64-bit and sequentially consistent; the two
 * sides meet in them without a system call.  Each word has one writer.  Step numbers are monotone and never
 * reset; "begun" is before the first kernel launch of a step, "done" is completed on the device. */
#ifndef EEP_COMMON_PAGE_H
#define EEP_COMMON_PAGE_H

#include <stdatomic.h>
#include <stdint.h>

#define PAGE_MAGIC 0x3145474150504545ULL /* "EEPPAGE1" */
#define GATE_OPEN UINT64_MAX
#define PAGE_HISTOGRAM 40 /* bucket i counts holds of [2^i, 2^(i+1)) ns */

enum page_engine_state {
    PAGE_ENGINE_NONE = 0, /* no engine attached (written by the agent on detach) */
    PAGE_ENGINE_IDLE,     /* at a boundary with nothing to run */
    PAGE_ENGINE_RUNNING,  /* in a step, or between two of them */
    PAGE_ENGINE_HELD,     /* at a boundary, waiting at the gate */
};

struct control_page {
    uint64_t magic;
    uint64_t size; /* bytes of the mapping */

    /* written by the engine (libeep) */
    _Alignas(64) _Atomic uint64_t intent;  /* step it is about to begin or has begun; n-1 while held before n */
    _Atomic uint64_t launched;             /* last step whose work was all launched */
    _Atomic uint64_t done;                 /* last step completed on the device */
    _Atomic uint64_t cur_view;             /* epoch of the view that the last begun step runs in */
    _Atomic uint64_t engine_state;         /* enum page_engine_state */
    _Atomic uint64_t wave;                 /* current_wave */
    _Atomic uint64_t running;              /* 1 inside a wave */
    _Atomic uint64_t step_ns_min;          /* minimum duration of the recent steps; 0 = not known */
    _Atomic uint64_t map_applied;          /* map_version that the engine's maps hold */
    _Atomic uint64_t map_applied_step;     /* first step that uses it; written before map_applied */
    _Atomic uint64_t last_hold_ns;         /* hold at the latest flip; 0 = not held */
    _Atomic uint64_t holds;                /* boundaries at which the engine was held */
    _Atomic uint64_t flips;                /* views switched */
    _Atomic uint64_t hold_histogram[PAGE_HISTOGRAM];
    _Atomic uint64_t boundary_syscalls;    /* system calls made by step begin/end: 0 while nothing is pending */

    /* written by the agent */
    _Alignas(64) _Atomic uint64_t gate; /* the engine begins no step >= gate */
    _Atomic uint64_t flip_step;         /* the flip applies to steps >= flip_step ... */
    _Atomic uint64_t flip_view;         /* ... and is pending while flip_view > cur_view */
    _Atomic uint64_t run_to;            /* run steps < run_to even without work */
    _Atomic uint64_t next_step;         /* the engine's next step is at least this (joiners, RESET) */
    _Atomic uint64_t flip_wave;         /* current_wave from the flip on */
    _Atomic uint64_t map_pending;       /* map_version that the engine shall apply at its next boundary */
    _Atomic uint64_t notify_done;       /* ring the bell when done reaches this; 0 = never */
    _Atomic uint64_t revoked;           /* epoch whose steps are to be left: set by RESET and by detach */
    _Atomic uint64_t attachment;        /* raised when a re-adopting agent gives its engine up: it keeps off the page */
};

/* What the agent core sees of the page: read by the edge just before an event is handed in. */
struct page_snapshot {
    uint64_t intent, launched, done, cur_view, engine_state, wave, running, step_ns_min;
    uint64_t map_applied, map_applied_step, last_hold_ns;
};

/* Words that the agent writes, by name, so that the core's page writes are actions in an order. */
enum page_word {
    PAGE_GATE,
    PAGE_FLIP_STEP,
    PAGE_FLIP_VIEW,
    PAGE_RUN_TO,
    PAGE_NEXT_STEP,
    PAGE_FLIP_WAVE,
    PAGE_MAP_PENDING,
    PAGE_NOTIFY_DONE,
    PAGE_REVOKED,
    PAGE_ATTACHMENT,
    PAGE_ENGINE_STATE, /* only PAGE_ENGINE_NONE, after a detach */
    PAGE_WORDS
};

void page_init(struct control_page *page); /* gate open, everything else 0 */
void page_read(struct control_page *page, struct page_snapshot *ret_snapshot);
void page_store(struct control_page *page, enum page_word word, uint64_t value);
const char *page_word_name(enum page_word word);

#endif
