/* The store's keys in order: a treap whose nodes know how many are under them, so that listing costs what is listed
 * and counting costs a logarithm.  Pure; the loop thread.
 *
 * A node's priority is its key's hash, mixed: the shape depends on the keys alone, and is as deep as a random tree. */
#include <string.h>

#include "coordinator/store_internal.h"

static uint32_t priority(const struct entry *e)
{
    uint32_t x = e->hh.hashv * 0x9e3779b1u;
    return x ^ x >> 15;
}

static uint32_t under(const struct entry *e)
{
    return e ? e->under : 0;
}

static struct entry *counted(struct entry *e)
{
    e->under = 1 + under(e->left) + under(e->right);
    return e;
}

static void split(struct entry *tree, const char *key, struct entry **ret_less, struct entry **ret_more)
{
    if (!tree) {
        *ret_less = *ret_more = NULL;
    } else if (strcmp(tree->key, key) < 0) {
        split(tree->right, key, &tree->right, ret_more);
        *ret_less = counted(tree);
    } else {
        split(tree->left, key, ret_less, &tree->left);
        *ret_more = counted(tree);
    }
}

static struct entry *merge(struct entry *less, struct entry *more)
{
    if (!less || !more)
        return less ? less : more;
    if (priority(less) > priority(more)) {
        less->right = merge(less->right, more);
        return counted(less);
    }
    more->left = merge(less, more->left);
    return counted(more);
}

static struct entry *insert(struct entry *tree, struct entry *entry)
{
    if (!tree)
        return counted(entry);
    if (priority(entry) > priority(tree)) {
        split(tree, entry->key, &entry->left, &entry->right);
        return counted(entry);
    }
    struct entry **side = strcmp(entry->key, tree->key) < 0 ? &tree->left : &tree->right;
    *side = insert(*side, entry);
    return counted(tree);
}

static struct entry *removed(struct entry *tree, struct entry *entry)
{
    if (tree == entry)
        return merge(entry->left, entry->right);
    struct entry **side = strcmp(entry->key, tree->key) < 0 ? &tree->left : &tree->right;
    *side = removed(*side, entry);
    return counted(tree);
}

void store_index_insert(struct store *s, struct entry *entry)
{
    entry->left = entry->right = NULL;
    s->index = insert(s->index, entry);
}

void store_index_remove(struct store *s, struct entry *entry)
{
    s->index = removed(s->index, entry);
}

/* ---- walking ---- */

struct walk {
    const char *prefix, *after;
    size_t prefix_len, left, seen;
    bool (*each)(void *user, const char *key, const struct store_value *value);
    void *user;
};

static bool wanted(const struct walk *w, const char *key) /* not before what the walk begins with */
{
    return strcmp(key, w->prefix) >= 0 && (!w->after || strcmp(key, w->after) > 0);
}

/* false: it is over. */
static bool walk(struct walk *w, const struct entry *tree)
{
    if (!tree)
        return true;
    bool here = wanted(w, tree->key);
    if (here && !walk(w, tree->left))
        return false;
    if (here) {
        if (!w->left || strncmp(tree->key, w->prefix, w->prefix_len) != 0)
            return false;
        struct store_value value = {.data = tree->value->data,
                                    .len = tree->value->len,
                                    .revision = tree->revision,
                                    .lease = tree->hold ? tree->hold->lease->id : 0,
                                    .durable = tree->durable,
                                    .batch = tree->batch};
        w->left--;
        w->seen++;
        if (!w->each(w->user, tree->key, &value))
            return false;
    }
    return walk(w, tree->right);
}

size_t store_list(const struct store *s, const char *prefix, const char *after, size_t max,
                  bool (*each)(void *user, const char *key, const struct store_value *value), void *user)
{
    struct walk w = {.prefix = prefix, .after = after, .prefix_len = strlen(prefix), .left = max, .each = each,
                     .user = user};
    (void)walk(&w, s->index);
    return w.seen;
}

/* How many keys are before every key with this prefix (end: or have it). */
static size_t rank_of(const struct entry *tree, const char *prefix, size_t len, bool end)
{
    size_t rank = 0;
    while (tree) {
        int order = strncmp(tree->key, prefix, len);
        if (order < 0 || (end && order == 0)) {
            rank += 1 + under(tree->left);
            tree = tree->right;
        } else {
            tree = tree->left;
        }
    }
    return rank;
}

size_t store_count(const struct store *s, const char *prefix)
{
    size_t len = strlen(prefix);
    return rank_of(s->index, prefix, len, true) - rank_of(s->index, prefix, len, false);
}
