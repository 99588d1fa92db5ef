# Ruby: a server with a thread for each connection, threads that wait in a queue, a condition and a
# sleep, a fiber, and a child by fork with its pipes. Each request asks all of them; answers
# "COUNT TICKS ok" on port 8080.
require 'socket'
require 'timeout'

count = ticks = 0
Thread.abort_on_exception = true
Thread.new { loop { sleep 0.01; ticks += 1 } }
Thread.new { sleep 3600 }

asked = Queue.new
answered = Queue.new
Thread.new { loop { answered << 2 * asked.pop } }

lock = Mutex.new
changed = ConditionVariable.new
seen = 0
Thread.new do
  lock.synchronize do
    loop { changed.wait(lock); seen += 1 }
  end
end

numbers = nil

to_child, from_parent = IO.pipe.reverse
from_child, to_parent = IO.pipe
fork do
  to_child.close
  from_child.close
  kept = 0
  while from_parent.gets
    to_parent.puts(kept += 1)
    to_parent.flush
  end
end
from_parent.close
to_parent.close
heap = (0...50_000).map { |n| "text #{n}" }

check = lambda do
  asked << count
  return 'the queue' unless Timeout.timeout(5) { answered.pop } == 2 * count
  lock.synchronize { changed.signal }
  400.times do
    break if lock.synchronize { seen } == count

    sleep 0.005
  end
  return 'the condition' unless lock.synchronize { seen } == count
  return 'the fiber' unless numbers.resume == count
  to_child.puts 'add'
  return 'the child' unless from_child.gets.to_i == count
  return 'a command' unless `echo said` == "said\n"
  GC.start
  return 'the heap' unless heap.each_with_index.all? { |text, n| text == "text #{n}" }
  'ok'
end

server = TCPServer.new('127.0.0.1', 8080)
# A fiber belongs to the thread that made it: one thread checks for all.
checks = Queue.new
Thread.new do
  numbers = Fiber.new { n = 0; loop { Fiber.yield(n += 1) } }
  loop do
    client = checks.pop
    count += 1
    verdict = check.call
    client.write "HTTP/1.1 200 OK\r\n\r\n#{count} #{ticks} #{verdict}\n"
    client.close
  end
end
loop do
  Thread.new(server.accept) do |client|
    nil until client.gets.to_s.strip.empty?
    checks << client
  end
end
