/* What every user of a libevent loop needs at its end. */
#ifndef EEP_COMMON_LOOP_H
#define EEP_COMMON_LOOP_H

#include <event2/event.h>

/* Ends a loop whose events and connections have been freed; takes NULL.  A bufferevent that was freed while a callback
 * of it was put off lives until the loop has passed over that callback: event_base_free() alone would forget both, and
 * leave its socket open.  Calls callbacks of nothing that was freed. */
void loop_free(struct event_base *base);

#endif
