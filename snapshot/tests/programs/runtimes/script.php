<?php
// A PHP script that runs on: a heap of objects, a generator, a child by fork with a socket pair, a
// signal timer. Each line on standard input asks all of them; the answer is "COUNT TICKS ok".
$ticks = 0;
pcntl_async_signals(true);
pcntl_signal(SIGALRM, function () use (&$ticks) {
    $ticks++;
    pcntl_alarm(1);
});
pcntl_alarm(1);
$pair = stream_socket_pair(STREAM_PF_UNIX, STREAM_SOCK_STREAM, 0);
if (pcntl_fork() === 0) {
    fclose($pair[0]);
    for ($kept = 1; fgets($pair[1]) !== false; $kept++) {
        fwrite($pair[1], "$kept\n");
    }
    exit(0);
}
fclose($pair[1]);
$numbers = (function () {
    for ($n = 1; ; $n++) {
        yield $n;
    }
})();
$heap = array_map(fn ($n) => (object) ['text' => "text $n"], range(0, 20000));
for ($count = 1; ($line = read()) !== false; $count++) {
    $wrong = [];
    if ($numbers->current() !== $count) {
        $wrong[] = 'the generator';
    }
    $numbers->next();
    fwrite($pair[0], "add\n");
    if ((int) fgets($pair[0]) !== $count) {
        $wrong[] = 'the child';
    }
    foreach ($heap as $n => $entry) {
        if ($entry->text !== "text $n") {
            $wrong[] = "entry $n";
        }
    }
    echo "$count $ticks ", $wrong ? implode(' ', $wrong) : 'ok', "\n";
}

// A line of standard input, although timers interrupt the wait for it.
function read()
{
    do {
        $line = fgets(STDIN);
    } while ($line === false && !feof(STDIN));
    return $line;
}
