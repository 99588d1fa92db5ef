<?php
// PHP's own server: what its worker processes share is a SysV segment and semaphore. Answers
// "COUNT TICKS ok" on port 8080; the ticks are those of the monotonic clock.
$semaphore = sem_get(7);
$segment = shm_attach(7, 1 << 16);
sem_acquire($semaphore);
$state = shm_has_var($segment, 1) ? shm_get_var($segment, 1) : ['count' => 0, 'seen' => []];
$state['count']++;
$state['seen'][] = $state['count'];
shm_put_var($segment, 1, $state);
sem_release($semaphore);
$verdict = 'ok';
if ($state['seen'] !== range(1, $state['count'])) {
    $verdict = 'the segment';
}
if (trim(shell_exec('echo said')) !== 'said') {
    $verdict = 'a command';
}
if (preg_match('/^(a+)+$/', 'aaaaaaaaaaab') !== 0 || hash('sha256', '') !== hash('sha256', '')) {
    $verdict = 'an expression';
}
printf("%d %d %s\n", $state['count'], intdiv(hrtime(true), 10_000_000), $verdict);
