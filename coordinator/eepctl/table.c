/* Aligned columns for eepctl.  Width is counted in code points, so that an agent's UTF-8 endpoint does not shift a row. */
#include "coordinator/eepctl/table.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static void cell_push(struct table *table, char *text)
{
    if (table->n == table->cap) {
        table->cap = table->cap ? table->cap * 2 : 64;
        table->cell = realloc(table->cell, table->cap * sizeof *table->cell);
        if (!table->cell)
            abort(); /* a command that runs for a moment: nothing to save */
    }
    table->cell[table->n++] = text;
}

void table_init(struct table *table, const char *const *headings)
{
    *table = (struct table){0};
    for (; headings[table->columns] && table->columns < TABLE_COLUMNS_MAX; table->columns++)
        cell_push(table, strdup(headings[table->columns]));
}

void table_done(struct table *table)
{
    for (size_t i = 0; i < table->n; i++)
        free(table->cell[i]);
    free(table->cell);
    *table = (struct table){0};
}

void table_cell(struct table *table, const char *fmt, ...)
{
    char *text = NULL;
    va_list args;
    va_start(args, fmt);
    if (vasprintf(&text, fmt, args) < 0)
        abort();
    va_end(args);
    if (!*text) {
        free(text);
        text = strdup("-");
    }
    cell_push(table, text);
}

static size_t width_of(const char *text)
{
    size_t width = 0;
    while (*text) {
        if (strncmp(text, "\033[", 2) == 0) { /* a colour has none */
            size_t len = strcspn(text, "m");
            text += text[len] ? len + 1 : len;
        } else {
            width += ((unsigned char)*text++ & 0xc0) != 0x80;
        }
    }
    return width;
}

void table_print(const struct table *table, FILE *out)
{
    size_t width[TABLE_COLUMNS_MAX] = {0};
    for (size_t i = 0; i < table->n; i++) {
        size_t w = width_of(table->cell[i]);
        if (w > width[i % table->columns])
            width[i % table->columns] = w;
    }
    for (size_t i = 0; i < table->n; i++) {
        size_t column = i % table->columns;
        fputs(table->cell[i], out);
        if (column + 1 == table->columns || i + 1 == table->n) {
            fputc('\n', out);
            continue;
        }
        for (size_t w = width_of(table->cell[i]); w < width[column] + 2; w++)
            fputc(' ', out);
    }
}
