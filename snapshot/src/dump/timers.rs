//! POSIX timers (timer_create(2)): what /proc tells, and what only the process itself can ask.

use nix::libc;

use super::caller::Caller;
use super::process::{Status, threads};
use super::{DumpError, proc_text};
use crate::manifest::{CREATED_ONE_BY_ONE, PosixTimer};

/// The timers of a process, by their numbers.
pub fn read(caller: &mut Caller<'_>, host: i32, pid: i32) -> Result<Vec<PosixTimer>, DumpError> {
    let path = format!("/proc/{host}/timers");
    let mut timers = parse(&proc_text(&path)?).ok_or_else(|| DumpError::Io {
        doing: format!("reading the timers in {path}"),
        source: std::io::ErrorKind::InvalidData.into(),
    })?;
    for timer in &mut timers {
        check_clock(timer, host, pid)?;
        if timer.notify & libc::SIGEV_THREAD_ID != 0 {
            timer.target = Status::read(host, timer.target)?.inner_pid()?;
        } else {
            timer.target = 0;
        }
        check_number(timer, ids_can_be_chosen(), pid)?;
        let args = [timer.id as u64, caller.scratch, 0, 0, 0, 0];
        caller.call(libc::SYS_timer_gettime, args)?;
        timer.times = caller.read()?;
    }
    timers.sort_unstable_by_key(|timer| timer.id);
    Ok(timers)
}

/// Where numbers cannot be chosen, a timer is made by making and deleting those before it.
fn check_number(timer: &PosixTimer, can_be_chosen: bool, pid: i32) -> Result<(), DumpError> {
    if timer.id <= CREATED_ONE_BY_ONE || can_be_chosen {
        return Ok(());
    }
    Err(DumpError::Refused(format!(
        "process {pid} has POSIX timer {}, a number that this kernel gives only after as many others",
        timer.id
    )))
}

/// Whether timer_create(2) can be told the number of a timer: from kernel 6.15 on.
pub fn ids_can_be_chosen() -> bool {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    const GET: libc::c_ulong = 2;
    // SAFETY: asks about a setting of this process; takes numbers only.
    let set = unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, 0, 0, 0) };
    set >= 0
}

/// A negative clock is the complement of a process id, times 8, and what it counts: 0 to 2, and 4 more
/// for a thread. With id 0 it is the caller's own, as the C library has it.
fn check_clock(timer: &PosixTimer, host: i32, pid: i32) -> Result<(), DumpError> {
    let name = match timer.clock {
        libc::CLOCK_REALTIME
        | libc::CLOCK_MONOTONIC
        | libc::CLOCK_BOOTTIME
        | libc::CLOCK_TAI
        | libc::CLOCK_PROCESS_CPUTIME_ID
        | -8..=-6 => return Ok(()),
        // It counts for the thread that made it, which nothing tells.
        libc::CLOCK_THREAD_CPUTIME_ID | -4..=-2 if threads(host)?.len() == 1 => return Ok(()),
        libc::CLOCK_THREAD_CPUTIME_ID | -4..=-2 => "the CPU time of one of its threads".to_owned(),
        libc::CLOCK_REALTIME_ALARM | libc::CLOCK_BOOTTIME_ALARM => "an alarm clock".to_owned(),
        clock if clock < 0 => "the CPU time of a process or thread of its choice".to_owned(),
        clock => format!("clock {clock}"),
    };
    Err(DumpError::Refused(format!(
        "process {pid} has POSIX timer {}, which goes by {name}",
        timer.id
    )))
}

/// proc_pid_timers(5): four lines for each.
fn parse(text: &str) -> Option<Vec<PosixTimer>> {
    let lines: Vec<&str> = text.lines().collect();
    lines.chunks(4).map(parse_one).collect()
}

fn parse_one(lines: &[&str]) -> Option<PosixTimer> {
    let [id, signal, notify, clock] = lines else {
        return None;
    };
    let (signal, value) = signal.strip_prefix("signal: ")?.split_once('/')?;
    let (how, target) = notify.strip_prefix("notify: ")?.split_once('/')?;
    let (kind, target) = target.split_once('.')?;
    let how = match how {
        "signal" => libc::SIGEV_SIGNAL,
        "none" => libc::SIGEV_NONE,
        "thread" => libc::SIGEV_THREAD,
        _ => return None,
    };
    Some(PosixTimer {
        id: id.strip_prefix("ID: ")?.trim().parse().ok()?,
        clock: clock.strip_prefix("ClockID: ")?.trim().parse().ok()?,
        signal: signal.parse().ok()?,
        value: u64::from_str_radix(value.trim(), 16).ok()?,
        notify: how
            | if kind == "tid" {
                libc::SIGEV_THREAD_ID
            } else {
                0
            },
        target: target.trim().parse().ok()?,
        times: [0; 4],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_are_read_from_proc() {
        let text = "ID: 3\nsignal: 34/00000000deadbeef\nnotify: signal/tid.77\nClockID: 1\n\
                    ID: 0\nsignal: 14/0000000000000000\nnotify: none/pid.76\nClockID: -6\n";
        let timers = parse(text).unwrap();
        assert_eq!(
            (timers[0].id, timers[0].signal, timers[0].clock),
            (3, 34, 1)
        );
        assert_eq!((timers[0].value, timers[0].target), (0xdead_beef, 77));
        assert_eq!(timers[0].notify, libc::SIGEV_THREAD_ID);
        assert_eq!((timers[1].notify, timers[1].clock), (libc::SIGEV_NONE, -6));
        assert!(parse("ID: 3\nsignal").is_none());
    }

    #[test]
    fn a_high_number_is_refused_where_numbers_cannot_be_chosen() {
        let text = "ID: 10000\nsignal: 0/0\nnotify: none/pid.7\nClockID: 1\n\
                    ID: 10001\nsignal: 0/0\nnotify: none/pid.7\nClockID: 1\n";
        let timers = parse(text).unwrap();
        assert!(check_number(&timers[0], false, 7).is_ok());
        assert!(check_number(&timers[1], true, 7).is_ok());
        let err = check_number(&timers[1], false, 7).unwrap_err().to_string();
        assert!(err.contains("process 7 has POSIX timer 10001"), "{err}");
    }

    #[test]
    fn clocks_that_nobody_else_can_ask_are_refused_by_name() {
        let on = |clock| PosixTimer {
            id: 3,
            clock,
            signal: 0,
            value: 0,
            notify: libc::SIGEV_NONE,
            target: 0,
            times: [0; 4],
        };
        let own = std::process::id() as i32;
        assert!(check_clock(&on(libc::CLOCK_BOOTTIME), own, 7).is_ok());
        for (clock, name) in [
            (libc::CLOCK_BOOTTIME_ALARM, "an alarm clock"),
            (libc::CLOCK_REALTIME_ALARM, "an alarm clock"),
            (-1000, "the CPU time of a process or thread of its choice"),
            (77, "clock 77"),
        ] {
            let err = check_clock(&on(clock), own, 7).unwrap_err().to_string();
            let wanted = format!("process 7 has POSIX timer 3, which goes by {name}");
            assert!(err.contains(&wanted), "{err}");
        }
    }
}
