/* What the demo shows while it happens: three lines, drawn again on a terminal, each second elsewhere. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "tests/demo/demo.h"

size_t demo_width(const struct demo *d)
{
    struct winsize size = {0};
    if (!d->tty || ioctl(1, TIOCGWINSZ, &size) < 0 || size.ws_col == 0)
        return 100;
    return size.ws_col;
}

/* A line of the view.  On a terminal it is cut, not wrapped: what is drawn again goes up by lines of the screen. */
static void __attribute__((format(printf, 2, 3))) demo_line(struct demo *d, const char *fmt, ...)
{
    char text[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    size_t width = demo_width(d);
    if (d->tty && width < sizeof(text))
        text[width - 1] = '\0';
    printf("%s\n", text);
    d->lines++;
}

void demo_clear(struct demo *d)
{
    for (; d->tty && d->lines > 0; d->lines--)
        printf("\033[A\033[2K");
    d->lines = 0;
}

void demo_show(struct demo *d, const char *title)
{
    static uint64_t last_plain;
    char a[32], b[32], ranks[256] = "";
    Pb__StatusReply *s = demo_status(d);
    json_t *feeder = demo_json(d, "feeder.json");
    if (!d->tty && cluster_now_ms() - last_plain < 1000)
        goto out;
    last_plain = cluster_now_ms();
    demo_clear(d);
    for (size_t i = 0; s && i < s->view->n_members && strlen(ranks) < sizeof(ranks) - 80; i++)
        snprintf(ranks + strlen(ranks), sizeof(ranks) - strlen(ranks), " %s%s", s->view->members[i]->id,
                 s->view->members[i]->draining ? "(leaving)" : "");
    const Pb__Operation *op = s && s->op_running ? s->op : NULL;
    if (op)
        demo_line(d, "  %-26s %-15s %s of %s%s%s", title, op->phase, demo_megabytes(op->bytes_done, a, sizeof(a)),
                  demo_megabytes(op->bytes_planned, b, sizeof(b)), op->awaited[0] ? "  awaits " : "", op->awaited);
    else
        demo_line(d, "  %-26s serving", title);
    demo_line(d, "  epoch %-3llu map %-4llu ranks:%s", s ? (unsigned long long)s->view->epoch : 0ULL,
              s ? (unsigned long long)s->view->map_version : 0ULL, ranks);
    demo_line(d, "  requests: %.0f issued, %.0f done, %.0f wrong; longest gap between tokens %.1f ms",
              demo_number(feeder, "issued"), demo_number(feeder, "completed"), demo_number(feeder, "wrong"),
              demo_number(feeder, "longest_gap_ms"));
    fflush(stdout);
out:
    json_decref(feeder);
    rpc_unpack_free((ProtobufCMessage *)s);
}
