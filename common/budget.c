/* A shared budget of memory: see budget.h. */
#include "common/budget.h"

#include <assert.h>
#include <utlist.h>

void budget_join(struct budget *budget, struct budget_holder *holder, void (*cut)(void *user, size_t bytes), void *user)
{
    *holder = (struct budget_holder){.budget = budget, .cut = cut, .user = user};
    if (budget)
        DL_APPEND(budget->holders, holder);
}

void budget_leave(struct budget_holder *holder)
{
    struct budget *budget = holder->budget;
    if (!budget)
        return;
    budget->used -= holder->bytes;
    DL_DELETE(budget->holders, holder);
    *holder = (struct budget_holder){0};
}

void budget_add(struct budget_holder *holder, size_t more, size_t less)
{
    struct budget *budget = holder->budget;
    if (!budget)
        return;
    assert(holder->bytes + more >= less);
    holder->bytes = holder->bytes + more - less;
    budget->used = budget->used + more - less;
}

void budget_keep(struct budget *budget)
{
    while (budget && budget->used > budget->limit) {
        struct budget_holder *holder, *most = NULL;
        DL_FOREACH(budget->holders, holder)
        {
            if (!most || holder->bytes > most->bytes)
                most = holder;
        }
        assert(most);
        struct budget_holder gone = *most;
        budget_leave(most);
        budget->cuts++;
        gone.cut(gone.user, gone.bytes);
    }
}
