/* Plain columns on a stream: headings, then rows, each column as wide as its widest cell.  eepctl only. */
#ifndef EEP_COORDINATOR_EEPCTL_TABLE_H
#define EEP_COORDINATOR_EEPCTL_TABLE_H

#include <stddef.h>
#include <stdio.h>

#define TABLE_COLUMNS_MAX 16

struct table {
    size_t columns, n, cap; /* cells, headings included */
    char **cell;
};

/* headings: strings, ended by NULL. */
void table_init(struct table *table, const char *const *headings);
void table_done(struct table *table);
/* The next cell, row by row; an empty one is shown as "-". */
void table_cell(struct table *table, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void table_print(const struct table *table, FILE *out);

#endif
