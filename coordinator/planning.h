/* Plans are made on threads of their own, so that the loop answers meanwhile: a plan takes up to seconds.  One thread
 * for each plan; there are few, and none waits for one that nobody wants any more.  Functions are for the loop thread.
 */
#ifndef EEP_COORDINATOR_PLANNING_H
#define EEP_COORDINATOR_PLANNING_H

#include "coordinator/plan_job.h"

struct planning;

int planning_new(struct planning **ret_planning, struct err *err) MUST_CHECK;
/* Waits for the threads, and drops what they have made.  Takes NULL. */
void planning_free(struct planning *planning);

/* Takes the job.  One that no thread can be started for comes back like the others, with an error as its result. */
void planning_submit(struct planning *planning, struct plan_job *job);
/* Readable when planning_completed has something. */
int planning_fd(const struct planning *planning);
/* A job that has been run, now the caller's; NULL: none. */
struct plan_job *planning_completed(struct planning *planning);

#endif
