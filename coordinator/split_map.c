/* The shares of a layer's map.  See split.h; pure. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/split.h"

static bool cell_usable(const struct split_map *m, size_t cell)
{
    return m->which[cell / m->slots] && m->held[cell] >= 0 && (m->wake || m->live[cell]);
}

/* Cells by expert: those of e are at cell[first[e]] up to first[e + 1], by party. */
static void cells_sort(const struct split_map *m, uint32_t *first, uint32_t *cell)
{
    size_t cells = (size_t)m->parties * m->slots;
    memset(first, 0, ((size_t)m->experts + 2) * sizeof *first);
    for (size_t i = 0; i < cells; i++)
        if (cell_usable(m, i))
            first[m->held[i] + 2]++;
    for (uint32_t e = 2; e < m->experts + 2; e++)
        first[e] += first[e - 1];
    for (size_t i = 0; i < cells; i++)
        if (cell_usable(m, i))
            cell[first[m->held[i] + 1]++] = (uint32_t)i;
}

/* The places of an expert, one a party: of two copies there the one that is routed to.  What is routed to twice on a
 * party is left as it is. */
static void map_add(struct split *s, const struct split_map *m, uint32_t e, const uint32_t *cell, uint32_t n)
{
    uint32_t live = 0, kept = 0, take[m->parties];
    bool twice = false;
    for (uint32_t i = 0; i < n; i++) {
        live += m->live[cell[i]] > 0;
        if (kept == 0 || take[kept - 1] / m->slots != cell[i] / m->slots)
            take[kept++] = cell[i];
        else if (m->live[take[kept - 1]])
            twice |= m->live[cell[i]] > 0;
        else
            take[kept - 1] = cell[i];
    }
    for (uint32_t i = 0; twice && i < n; i++)
        if (m->live[cell[i]])
            split_fix(s, e, cell[i] / m->slots, 1.0 / live);
    for (uint32_t i = 0; !twice && i < kept; i++)
        split_add(s, e, take[i] / m->slots, take[i], m->live[take[i]] ? 1.0 / live : 0);
}

int split_map(struct split *s, const struct split_map *m)
{
    size_t cells = (size_t)m->parties * m->slots;
    int rc = split_begin(s, m->parties, m->experts, cells, m->weight, m->samples);
    uint32_t *first = rc < 0 ? NULL : malloc(((size_t)m->experts + 2 + cells) * sizeof *first);
    if (!first)
        return ERR_NOMEM;
    uint32_t *cell = first + m->experts + 2;
    cells_sort(m, first, cell);
    for (uint32_t e = 0; e < m->experts; e++)
        map_add(s, m, e, cell + first[e], first[e + 1] - first[e]);
    free(first);
    split_end(s);
    for (size_t i = 0; i < cells; i++)
        m->live[i] = m->live[i] > 0;
    double even = split_peak(s);
    split_round(s, m->live);
    for (uint32_t at = 0; split_peak(s) < even * (1 - 1e-6) && at < s->places; at++)
        m->live[s->at[at].cell] = (uint8_t)s->at[at].entries;
    return 0;
}
