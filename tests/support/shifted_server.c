/* Shift the wall clock of a process by the microseconds in the file that SHIFT_FILE names.  The file may change at any time. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int64_t microseconds(void) {
  static volatile int64_t *shift;
  if (!shift) {
    int file = open(getenv("SHIFT_FILE"), O_RDONLY);
    shift = mmap(NULL, sizeof *shift, PROT_READ, MAP_SHARED, file, 0);
    close(file);
  }
  return *shift;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
  int failed = (int)syscall(SYS_clock_gettime, clock, time);
  if (!failed && clock == CLOCK_REALTIME) {
    int64_t all = time->tv_sec * INT64_C(1000000000) + time->tv_nsec + microseconds() * 1000;
    time->tv_sec = all / INT64_C(1000000000);
    time->tv_nsec = all % INT64_C(1000000000);
  }
  return failed;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  time->tv_sec = now.tv_sec;
  time->tv_usec = now.tv_nsec / 1000;
  return 0;
}
