/* Configuration files of the daemons: the shipped ones have every option and are good; mistakes get their line and the
 * nearest name; later files and the command line replace; a reload takes over what it may. */
#include "tests/harness/suite.h"
#include "tests/integration/itest_run.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/harness/daemon.h"

static char dir[64];

static void setup(void)
{
    strcpy(dir, "/tmp/eep-config-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
}

static void teardown(void)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", dir);
    ck_assert_int_eq(system(command), 0);
}

/* A file in the folder; its path is good until the next call but three. */
static const char *file(const char *name, const char *text)
{
    static char paths[4][128];
    static unsigned turn;
    char *path = paths[turn++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    fclose(f);
    return path;
}

static char *slurp(const char *path)
{
    static char text[65536];
    FILE *f = fopen(path, "r");
    ck_assert_msg(f != NULL, "cannot open %s", path);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    return text;
}

/* Options of --help that no file can have. */
static bool only_shell(const char *name)
{
    static const char *const names[] = {"help", "usage", "config", "check-config", "list-gpus", "foreground"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(name, names[i]) == 0)
            return true;
    return false;
}

/* Every option of --help stands as "#name = " in the shipped file, and every such line is an option with a value that
 * is taken: all of them uncommented pass --check-config. */
static void check_documented(const char *program, const char *shipped)
{
    static char help[65536], uncommented[65536];
    char command[256], name[64], want[80];
    snprintf(command, sizeof command, "%s --help", program);
    ck_assert_int_eq(run(command), 0);
    strcpy(help, said);
    const char *text = slurp(shipped);
    unsigned found = 0;
    for (const char *line = help; (line = strstr(line, "\n"));) {
        line++;
        const char *dashes = strstr(line, "--"), *end = strchr(line, '\n');
        if (!end || dashes != line + 6 || sscanf(dashes + 2, "%63[a-z0-9-]", name) != 1 || only_shell(name))
            continue;
        snprintf(want, sizeof want, "\n#%s = ", name);
        ck_assert_msg(strstr(text, want) != NULL, "%s: the option '%s' is not documented", shipped, name);
        found++;
    }
    ck_assert_uint_gt(found, 15);

    size_t n = 0;
    unsigned lines = 0;
    for (const char *p = text; *p; p++) {
        bool key = *p == '#' && p[1] >= 'a' && p[1] <= 'z' && (p == text || p[-1] == '\n');
        lines += key;
        if (strncmp(p, "/etc/eep/tls/", strlen("/etc/eep/tls/")) == 0) { /* certificates of ours */
            n += (size_t)sprintf(uncommented + n, "%s/", dir);
            p += strlen("/etc/eep/tls/") - 1;
        } else if (!key) {
            uncommented[n++] = *p;
        }
    }
    uncommented[n] = '\0';
    ck_assert_uint_eq(lines, found); /* no line documents what is no option (any more) */
    snprintf(command, sizeof command, "%s --config %s --check-config", program, file("all.conf", uncommented));
    REFUSED(command, 0, "the configuration is good");
}

START_TEST(every_option_is_documented)
{
    char command[512];
    snprintf(command, sizeof command,
             "d=%s; systemd/eep-ca init $d && systemd/eep-ca issue $d eep coordinator && "
             "systemd/eep-ca issue $d eep agent/gpu0",
             dir);
    ck_assert_int_eq(system(command), 0);
    check_documented("eep-coordinator", "systemd/config/coordinator.conf");
    check_documented("eep-agent", "systemd/config/agent.conf");
}
END_TEST

START_TEST(the_shipped_files_are_good)
{
    REFUSED("eep-coordinator --config systemd/config/coordinator.conf --check-config", 0, "is good");
    REFUSED("eep-agent --id a --config systemd/config/agent.conf --check-config", 0, "is good");
}
END_TEST

#define CONF(program, text, code, sentence)                                                                            \
    do {                                                                                                               \
        char command_[256];                                                                                            \
        snprintf(command_, sizeof command_, program " --check-config --config %s", file("a.conf", text));              \
        REFUSED(command_, code, sentence);                                                                             \
    } while (0)

START_TEST(mistakes)
{
    char longer[400] = "[coordinator]\nstate = ";
    CONF("eep-coordinator", "[coordinator]\nlease = 5000\n", 2,
         "a.conf:2: there is no option 'lease'; the nearest one is 'lease-ms'");
    CONF("eep-coordinator", "[coordinator]\n\nlease-ms = soon\n", 2, "a.conf:3: --lease-ms must be a whole number");
    CONF("eep-coordinator", "[coordinator]\nlease-ms = 100\n", 2, "at least twice");
    CONF("eep-coordinator", "[coordinator]\nslots = 4\nslots = 5\n", 2, "a.conf:3: 'slots' stands twice");
    CONF("eep-coordinator", "[coordinator]\ninsecure = maybe\n", 2, "a.conf:2: 'insecure' is yes or no");
    CONF("eep-coordinator", "[agent]\nid = a\n", 2, "a.conf:2: the section [agent] is unknown: use [coordinator]");
    CONF("eep-coordinator", "slots = 4\n", 2, "begin the file with [coordinator]");
    CONF("eep-coordinator", "[coordinator]\nwhat is this\n", 2, "a.conf:2: neither");
    CONF("eep-coordinator", "[coordinator]\nhelp = yes\n", 2, "there is no option 'help'");
    CONF("eep-coordinator", "[coordinator]\nlisten = 192.0.2.1:1\n", 2, "--insecure");
    CONF("eep-coordinator", "[coordinator]\nlog-level = loud\n", 2, "unknown log level 'loud'");
    CONF("eep-agent", "[agent]\nnode = 1\n", 2, "--id NAME is required");
    CONF("eep-agent", "[agent]\nid = a\ncheckpoint =\n", 2, "must not be empty");
    CONF("eep-agent", "[agent]\nid = a\nslot = 4\n", 2, "the nearest one is 'slots'");
    for (int i = 0; i < 300; i++)
        strcat(longer, "x");
    CONF("eep-coordinator", longer, 2, "a.conf:2: the line is longer than");
    REFUSED("eep-coordinator --check-config --config /nonexistent/x.conf", 2, "cannot read the configuration file");
    REFUSED("eep-coordinator --check-config --config=-/nonexistent/x.conf", 0, "is good");
}
END_TEST

START_TEST(the_later_one_counts)
{
    char command[512];
    const char *first = file("1.conf", "[agent]\nid = a\nslots = 70000\nlisten = nonsense\n");
    const char *second = file("2.conf", "[agent]\nslots = 7\n");
    snprintf(command, sizeof command, "eep-agent --config %s --config %s --listen 127.0.0.1:0 --check-config", first,
             second);
    REFUSED(command, 0, "is good");
    snprintf(command, sizeof command, "eep-agent --config %s --config %s --listen 127.0.0.1:0 --check-config", second,
             first);
    REFUSED(command, 2, "1.conf:3: --slots must be");

    /* the command line replaces the whole list, so the coordinator listens there only */
    const char *list = file("3.conf", "[coordinator]\nlisten = 192.0.2.1:1\nlisten = 192.0.2.2:1\n");
    snprintf(command, sizeof command, "eep-coordinator --config %s --check-config", list);
    REFUSED(command, 2, "192.0.2.1");
    snprintf(command, sizeof command, "eep-coordinator --config %s --listen 127.0.0.1:0 --check-config", list);
    REFUSED(command, 0, "is good");
}
END_TEST

static void wait_log(const struct daemon_process *d, const char *says)
{
    char path[80];
    snprintf(path, sizeof path, "%s/log", d->dir);
    for (int i = 0; i < 1000; i++) {
        if (strstr(slurp(path), says))
            return;
        usleep(10000);
    }
    ck_abort_msg("never logged \"%s\": %s", says, slurp(path));
}

START_TEST(reload)
{
    struct daemon_process d;
    daemon_process_init(&d);
    char conf[128];
    snprintf(conf, sizeof conf, "%s", file("c.conf", "[coordinator]\nslots = 4\nlog-level = error\n"));
    d.own_level = true;
    d.extra[0] = "--config";
    d.extra[1] = conf;
    ck_assert(daemon_process_start(&d));
    file("c.conf", "[coordinator]\nslots = x\nlog-level = info\n");
    kill(d.pid, SIGHUP);
    wait_log(&d, "c.conf:2: --slots must be a whole number");
    file("c.conf", "[coordinator]\nslots = 8\nlease-ms = 9000\nlog-level = info\n");
    kill(d.pid, SIGHUP);
    wait_log(&d, "event=reloaded wait_for_restart=lease-ms,slots"); /* its level is info: it was taken over */
    ck_assert_int_eq(daemon_process_stop(&d, SIGTERM), 0);
}
END_TEST

/* As systemd does it: a blocking socket, as descriptor 3.  Its file stays when the coordinator stops. */
START_TEST(a_socket_of_systemd)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    char state[128], command[256];
    snprintf(name.sun_path, sizeof name.sun_path, "%s/sd.sock", dir);
    snprintf(state, sizeof state, "%s/state", dir);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&name, sizeof name), 0);
    ck_assert_int_eq(listen(fd, 8), 0);
    pid_t pid = fork();
    if (pid == 0) {
        char self[32], program[256];
        const char *bin = getenv("EEP_BIN");
        snprintf(program, sizeof program, "%s/eep-coordinator", bin ? bin : "build");
        snprintf(self, sizeof self, "%ld", (long)getpid());
        setenv("LISTEN_PID", self, 1);
        setenv("LISTEN_FDS", "1", 1);
        if (fd != 3)
            dup2(fd, 3);
        execl(program, program, "--state", state, "--log-level", "error", (char *)NULL);
        _exit(127);
    }
    snprintf(command, sizeof command, "eepctl -c unix:%s status", name.sun_path); /* waits in the socket's queue */
    REFUSED(command, 0, "no view yet");
    REFUSED(command, 0, "no view yet"); /* the loop is not stuck in accept() */
    kill(pid, SIGTERM);
    int status;
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_int_eq(status, 0);
    ck_assert_int_eq(access(name.sun_path, F_OK), 0);
    int other = socket(AF_UNIX, SOCK_STREAM, 0); /* and it still listens: the next process gets who comes now */
    ck_assert_int_eq(connect(other, (struct sockaddr *)&name, sizeof name), 0);
    close(other);
    close(fd);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, every_option_is_documented);
    tcase_add_test(t, the_shipped_files_are_good);
    tcase_add_test(t, mistakes);
    tcase_add_test(t, the_later_one_counts);
    tcase_add_test(t, reload);
    tcase_add_test(t, a_socket_of_systemd);
}

int main(void)
{
    Suite *s = suite_create("config");
    TCase *t = tcase_create("config");
    tcase_set_timeout(t, 60);
    add(t);
    suite_add_tcase(s, t);
    return suite_run(s);
}
