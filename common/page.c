/* Access to the control page by the agent: initialisation, snapshots, and stores by name.  Any thread of the agent;
 * the order of two stores is the order of the calls. */
#include "common/page.h"

#include <assert.h>
#include <string.h>

void page_init(struct control_page *page)
{
    memset(page, 0, sizeof *page);
    page->size = sizeof *page;
    atomic_store(&page->gate, GATE_OPEN);
    page->magic = PAGE_MAGIC;
}

/* The words cannot be read all at once, so the order makes the snapshot consistent: a word that implies another one
 * is read before it.  done <= intent; a new cur_view implies its last_hold_ns and an intent that is not below the
 * flip's step; map_applied implies map_applied_step. */
void page_read(struct control_page *page, struct page_snapshot *ret_snapshot)
{
    ret_snapshot->done = atomic_load(&page->done); /* before launched: an old one errs on the safe side */
    ret_snapshot->launched = atomic_load(&page->launched);
    ret_snapshot->map_applied = atomic_load(&page->map_applied);
    ret_snapshot->map_applied_step = atomic_load(&page->map_applied_step);
    ret_snapshot->cur_view = atomic_load(&page->cur_view);
    ret_snapshot->last_hold_ns = atomic_load(&page->last_hold_ns);
    ret_snapshot->wave = atomic_load(&page->wave);
    ret_snapshot->running = atomic_load(&page->running);
    ret_snapshot->step_ns_min = atomic_load(&page->step_ns_min);
    ret_snapshot->engine_state = atomic_load(&page->engine_state);
    ret_snapshot->intent = atomic_load(&page->intent);
}

void page_store(struct control_page *page, enum page_word word, uint64_t value)
{
    switch (word) {
    case PAGE_GATE:
        atomic_store(&page->gate, value);
        return;
    case PAGE_FLIP_STEP:
        atomic_store(&page->flip_step, value);
        return;
    case PAGE_FLIP_VIEW:
        atomic_store(&page->flip_view, value);
        return;
    case PAGE_RUN_TO:
        atomic_store(&page->run_to, value);
        return;
    case PAGE_NEXT_STEP:
        atomic_store(&page->next_step, value);
        return;
    case PAGE_FLIP_WAVE:
        atomic_store(&page->flip_wave, value);
        return;
    case PAGE_MAP_PENDING:
        atomic_store(&page->map_pending, value);
        return;
    case PAGE_NOTIFY_DONE:
        atomic_store(&page->notify_done, value);
        return;
    case PAGE_REVOKED:
        atomic_store(&page->revoked, value);
        return;
    case PAGE_ATTACHMENT:
        atomic_store(&page->attachment, value);
        return;
    case PAGE_ENGINE_STATE:
        assert(value == PAGE_ENGINE_NONE); /* every other value is the engine's to write */
        atomic_store(&page->engine_state, value);
        return;
    case PAGE_WORDS:
        break;
    }
    assert(0 && "unknown word of the control page");
}

const char *page_word_name(enum page_word word)
{
    switch (word) {
    case PAGE_GATE:
        return "gate";
    case PAGE_FLIP_STEP:
        return "flip_step";
    case PAGE_FLIP_VIEW:
        return "flip_view";
    case PAGE_RUN_TO:
        return "run_to";
    case PAGE_NEXT_STEP:
        return "next_step";
    case PAGE_FLIP_WAVE:
        return "flip_wave";
    case PAGE_MAP_PENDING:
        return "map_pending";
    case PAGE_NOTIFY_DONE:
        return "notify_done";
    case PAGE_REVOKED:
        return "revoked";
    case PAGE_ATTACHMENT:
        return "attachment";
    case PAGE_ENGINE_STATE:
        return "engine_state";
    case PAGE_WORDS:
        break;
    }
    return "unknown";
}
