/* The end of a loop: what was freed with a callback put off is really gone. */
#include <check.h>
#include <event2/bufferevent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/loop.h"
#include "tests/harness/suite.h"

static void on_read(struct bufferevent *bev, void *user)
{
    (void)bev;
    ++*(int *)user;
}

START_TEST(a_connection_freed_with_a_callback_put_off)
{
    int fds[2], calls = 0;
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds), 0);
    struct event_base *base = event_base_new();
    ck_assert_ptr_nonnull(base);
    struct bufferevent *bev = bufferevent_socket_new(base, fds[0], BEV_OPT_CLOSE_ON_FREE | BEV_OPT_DEFER_CALLBACKS);
    ck_assert_ptr_nonnull(bev);
    bufferevent_setcb(bev, on_read, NULL, NULL, &calls);
    bufferevent_trigger(bev, EV_READ, BEV_TRIG_IGNORE_WATERMARKS | BEV_TRIG_DEFER_CALLBACKS);
    bufferevent_setcb(bev, NULL, NULL, NULL, NULL);
    bufferevent_free(bev);
    loop_free(base);
    ck_assert_int_eq(calls, 0);
    ck_assert_int_eq(fcntl(fds[0], F_GETFD), -1);
    close(fds[1]);
}
END_TEST

START_TEST(none)
{
    loop_free(NULL);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("loop");
    TCase *t = tcase_create("end");
    tcase_add_test(t, a_connection_freed_with_a_callback_put_off);
    tcase_add_test(t, none);
    suite_add_tcase(s, t);
    return suite_run(s);
}
