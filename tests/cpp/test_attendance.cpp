// How many threads take part in decoding steps, from what became of the steps before.
#include <cstdio>

#include "attendance.h"

namespace {

using mlf::Attendance;

int failures = 0;

void expect(const char* what, int got, int want) {
  if (got == want) return;
  std::fprintf(stderr, "%s: %d, not %d\n", what, got, want);
  ++failures;
}

void steps(Attendance& attendance, int count, bool late) {
  for (int i = 0; i < count; ++i) attendance.note(late);
}

// Steps on time until the number of threads changes, at most 10000.
int steps_until_change(Attendance& attendance) {
  const int before = attendance.threads();
  int count = 0;
  while (attendance.threads() == before && count < 10000) {
    attendance.note(false);
    ++count;
  }
  return count;
}

void a_few_late_steps_are_noise() {
  Attendance attendance(4);
  for (int round = 0; round < 100; ++round) {
    steps(attendance, 3, true);
    expect("after three late steps", attendance.threads(), 4);
    steps(attendance, 9, false);
  }
  steps(attendance, 4, true);
  expect("after four late steps", attendance.threads(), 3);
}

void late_steps_among_others_count() {
  Attendance attendance(2);
  for (int round = 0; round < 5; ++round) {
    attendance.note(true);
    if (round < 4) attendance.note(false);
  }
  expect("after every other step was late", attendance.threads(), 1);
}

void one_thread_always_stays() {
  Attendance attendance(2);
  steps(attendance, 4, true);
  for (int step = 0; step < 1000; ++step) {  // trials begin and fail at once
    const bool tried = attendance.threads() == 2;
    attendance.note(true);
    if (tried) {
      expect("after a late step of a trial", attendance.threads(), 2);
      attendance.note(true);
      expect("after two late steps of a trial", attendance.threads(), 1);
    }
    expect("at least one thread", attendance.threads() >= 1 && attendance.threads() <= 2, true);
  }
  Attendance alone(1);
  steps(alone, 1000, true);
  steps(alone, 1000, false);
  expect("of one thread", alone.threads(), 1);
}

void trials_that_fail_become_rare() {
  Attendance attendance(2);
  steps(attendance, 4, true);
  for (int rest : {8, 16, 32, 64, 128, 128}) {
    expect("steps until a trial", steps_until_change(attendance), rest);
    expect("threads of a trial", attendance.threads(), 2);
    steps(attendance, 6, false);
    steps(attendance, 2, true);  // the last steps of the trial
    expect("threads after a trial that failed", attendance.threads(), 1);
  }
}

void a_trial_that_succeeds_is_forgiven() {
  Attendance attendance(2);
  steps(attendance, 4, true);
  steps_until_change(attendance);
  steps(attendance, 2, true);
  expect("steps until the second trial", steps_until_change(attendance), 16);
  steps(attendance, 4, false);
  attendance.note(true);  // one late step of a trial is noise, too
  steps(attendance, 3, false);
  attendance.note(true);
  expect("a late step after the trial", attendance.threads(), 2);
  steps(attendance, 3, true);
  expect("four late steps after the trial", attendance.threads(), 1);
  expect("steps until the next trial", steps_until_change(attendance), 8);
}

void threads_come_back_one_by_one() {
  Attendance attendance(3);
  steps(attendance, 8, true);
  expect("after eight late steps", attendance.threads(), 1);
  steps_until_change(attendance);
  expect("after a rest", attendance.threads(), 2);
  steps_until_change(attendance);
  expect("after another", attendance.threads(), 3);
  steps(attendance, 1000, false);
  expect("after all of them", attendance.threads(), 3);
}

}  // namespace

int main() {
  a_few_late_steps_are_noise();
  late_steps_among_others_count();
  one_thread_always_stays();
  trials_that_fail_become_rare();
  a_trial_that_succeeds_is_forgiven();
  threads_come_back_one_by_one();
  return failures != 0;
}
