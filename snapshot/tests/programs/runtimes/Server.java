import com.sun.net.httpserver.HttpServer;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.InetSocketAddress;
import java.nio.ByteBuffer;
import java.nio.MappedByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.*;
import java.util.concurrent.atomic.AtomicLong;

/**
 * A server with a pool of threads, a schedule, a thread in a monitor, one in a queue, a heap that is
 * collected, memory outside of it, a mapped file and a command. Each request asks all of them; answers "COUNT TICKS ok" on port 8080.
 */
public class Server {
    static final AtomicLong ticks = new AtomicLong();
    static final Object monitor = new Object();
    static long count, woken;
    static MappedByteBuffer mapped;
    static ByteBuffer direct = ByteBuffer.allocateDirect(1 << 20);
    static Process command;
    static BufferedReader said;

    static String check(SynchronousQueue<Long> asked, SynchronousQueue<Long> answered,
            ExecutorService pool, List<String> heap, ScheduledFuture<?> far) throws Exception {
        asked.put(count);
        if (!Long.valueOf(2 * count).equals(answered.poll(5, TimeUnit.SECONDS))) {
            return "the queue";
        }
        synchronized (monitor) {
            monitor.notifyAll();
            long until = System.nanoTime() + 5_000_000_000L;
            while (woken != count && System.nanoTime() < until) {
                monitor.wait(1);
            }
            if (woken != count) {
                return "the monitor";
            }
        }
        List<Future<Integer>> squares = new ArrayList<>();
        for (int n = 0; n < 50; n++) {
            int number = n;
            squares.add(pool.submit(() -> number * number));
        }
        for (int n = 0; n < 50; n++) {
            if (squares.get(n).get(5, TimeUnit.SECONDS) != n * n) {
                return "the pool";
            }
        }
        mapped.putLong(8192, mapped.getLong(8192) + 1);
        direct.putLong(8192, direct.getLong(8192) + 1);
        if (mapped.getLong(8192) != count || direct.getLong(8192) != count) {
            return "the mapped file";
        }
        command.getOutputStream().write((count + "\n").getBytes());
        command.getOutputStream().flush();
        if (!said.readLine().equals(String.valueOf(count))) {
            return "the command";
        }
        if (new ProcessBuilder("/bin/true").start().waitFor() != 0) {
            return "a command that ends";
        }
        byte[][] garbage = new byte[100][];
        for (int n = 0; n < 100; n++) {
            garbage[n] = new byte[100_000];
        }
        System.gc();
        for (int n = 0; n < heap.size(); n++) {
            if (!heap.get(n).equals("text " + n)) {
                return "the heap";
            }
        }
        return far.getDelay(TimeUnit.SECONDS) > 3000 ? "ok" : "the timer";
    }

    public static void main(String[] arguments) throws Exception {
        try (FileChannel file = FileChannel.open(Path.of("/dev/shm/mapped"), StandardOpenOption.CREATE,
                StandardOpenOption.READ, StandardOpenOption.WRITE)) {
            mapped = file.map(FileChannel.MapMode.READ_WRITE, 0, 1 << 16);
        }
        command = new ProcessBuilder("/bin/cat").start();
        said = new BufferedReader(new InputStreamReader(command.getInputStream()));
        ScheduledExecutorService schedule = Executors.newScheduledThreadPool(2);
        schedule.scheduleAtFixedRate(ticks::incrementAndGet, 10, 10, TimeUnit.MILLISECONDS);
        ScheduledFuture<?> far = schedule.schedule(() -> System.exit(1), 1, TimeUnit.HOURS);
        ExecutorService pool = Executors.newFixedThreadPool(4);
        SynchronousQueue<Long> asked = new SynchronousQueue<>(), answered = new SynchronousQueue<>();
        pool.submit(() -> {
            while (true) {
                answered.put(2 * asked.take());
            }
        });
        Thread waiter = new Thread(() -> {
            synchronized (monitor) {
                while (true) {
                    // Spurious wake-ups are told apart by the count.
                    while (woken == count) {
                        try {
                            monitor.wait();
                        } catch (InterruptedException e) {
                            return;
                        }
                    }
                    woken++;
                }
            }
        });
        waiter.setDaemon(true);
        waiter.start();
        List<String> heap = new ArrayList<>();
        for (int n = 0; n < 50_000; n++) {
            heap.add("text " + n);
        }
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", 8080), 16);
        server.setExecutor(Executors.newCachedThreadPool());
        server.createContext("/", exchange -> {
            String verdict;
            synchronized (Server.class) {
                synchronized (monitor) {
                    count++;
                }
                try {
                    verdict = check(asked, answered, pool, heap, far);
                } catch (Exception e) {
                    verdict = e.toString();
                }
            }
            byte[] answer = (count + " " + ticks + " " + verdict + "\n").getBytes();
            exchange.getResponseHeaders().set("Connection", "close");
            exchange.sendResponseHeaders(200, answer.length);
            exchange.getResponseBody().write(answer);
            exchange.close();
        });
        server.start();
    }
}
