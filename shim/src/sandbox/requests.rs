//! Answers given before: the same request id again returns the first answer.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;

use crate::error::ShimError;

/// Answers kept; a repetition comes soon after the call or not at all.
const KEPT: usize = 4096;

type Answer = Result<Vec<u8>, ttrpc::proto::Status>;

/// The memory of answers.
#[derive(Default)]
pub struct Requests {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    answers: HashMap<String, Arc<OnceCell<Answer>>>,
    order: VecDeque<String>,
}

impl Requests {
    /// Runs a call once for its id; whoever repeats it waits for and gets the same answer.
    pub async fn once<T, F>(&self, method: &str, id: &str, call: F) -> ttrpc::Result<T>
    where
        T: protobuf::Message + Send + 'static,
        F: Future<Output = crate::error::Result<T>> + Send + 'static,
    {
        if id.is_empty() {
            return Err(ShimError::InvalidArgument(format!(
                "{method} needs a request_id: a new one for each call, the same for a repetition"
            ))
            .into());
        }
        let cell = self.cell(format!("{method} {id}"));
        let answering = Arc::clone(&cell);
        // A task of its own: the client may leave, but the change must not stop half-way, and its
        // answer must be there for whoever repeats the call.
        let answered = tokio::spawn(async move {
            let run = || async {
                let done = tokio::spawn(call).await;
                let done = done.unwrap_or_else(|err| Err(ShimError::Fault(err.to_string())));
                done.and_then(|reply| {
                    reply
                        .write_to_bytes()
                        .map_err(ShimError::engine("encode an answer"))
                })
                .map_err(status)
            };
            answering.get_or_init(run).await.clone()
        });
        let answer = match answered.await {
            Ok(answer) => answer,
            Err(err) => Err(status(ShimError::Fault(err.to_string()))),
        };
        match answer {
            Ok(bytes) => T::parse_from_bytes(&bytes).map_err(|err| {
                ShimError::Fault(format!("a kept answer does not decode: {err}")).into()
            }),
            Err(status) => Err(ttrpc::Error::RpcStatus(status)),
        }
    }

    fn cell(&self, key: String) -> Arc<OnceCell<Answer>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cell) = known.answers.get(&key) {
            return Arc::clone(cell);
        }
        if known.order.len() >= KEPT
            && let Some(oldest) = known.order.pop_front()
        {
            known.answers.remove(&oldest);
        }
        let cell = Arc::new(OnceCell::new());
        known.answers.insert(key.clone(), Arc::clone(&cell));
        known.order.push_back(key);
        cell
    }
}

fn status(err: ShimError) -> ttrpc::proto::Status {
    match ttrpc::Error::from(err) {
        ttrpc::Error::RpcStatus(status) => status,
        other => ttrpc::get_status(ttrpc::Code::INTERNAL, other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use trenv_sandbox_proto::PrepareResponse;

    async fn call(count: Arc<AtomicU32>, fail: bool) -> crate::error::Result<PrepareResponse> {
        let resident_bytes = u64::from(count.fetch_add(1, Ordering::Relaxed));
        if fail {
            return Err(ShimError::Exhausted("full".into()));
        }
        Ok(PrepareResponse {
            resident_bytes,
            ..PrepareResponse::default()
        })
    }

    #[tokio::test]
    async fn a_repetition_gets_the_first_answer_and_runs_nothing() {
        let requests = Requests::default();
        let count = Arc::new(AtomicU32::new(7));
        for _ in 0..3 {
            let reply = requests
                .once("Prepare", "r1", call(Arc::clone(&count), false))
                .await
                .unwrap();
            assert_eq!(reply.resident_bytes, 7);
        }
        for _ in 0..2 {
            let err = requests
                .once("Prepare", "r2", call(Arc::clone(&count), true))
                .await
                .unwrap_err();
            assert!(err.to_string().contains("full"));
        }
        assert_eq!(count.load(Ordering::Relaxed), 9);
    }

    async fn slow_call(count: Arc<AtomicU32>) -> crate::error::Result<PrepareResponse> {
        tokio::time::sleep(Duration::from_millis(50)).await;
        call(count, false).await
    }

    #[tokio::test]
    async fn a_repetition_of_a_call_under_way_waits_for_its_answer() {
        let requests = Requests::default();
        let count = Arc::new(AtomicU32::new(7));
        let one = || requests.once("Prepare", "r1", slow_call(Arc::clone(&count)));
        let (first, second) = tokio::join!(one(), one());
        assert_eq!(first.unwrap().resident_bytes, 7);
        assert_eq!(second.unwrap().resident_bytes, 7);
        assert_eq!(count.load(Ordering::Relaxed), 8);
    }

    #[tokio::test]
    async fn a_client_that_leaves_and_repeats_its_call_gets_the_answer_of_the_first() {
        let requests = Requests::default();
        let count = Arc::new(AtomicU32::new(7));
        let once = requests.once("Prepare", "r1", slow_call(Arc::clone(&count)));
        let left = tokio::time::timeout(Duration::from_millis(10), once).await;
        assert!(left.is_err(), "the first call was answered too soon");
        let again = requests.once("Prepare", "r1", slow_call(Arc::clone(&count)));
        assert_eq!(again.await.unwrap().resident_bytes, 7);
        assert_eq!(count.load(Ordering::Relaxed), 8);
    }

    #[tokio::test]
    async fn an_id_counts_for_its_own_method_only_and_old_answers_go() {
        let requests = Requests::default();
        let count = Arc::new(AtomicU32::new(0));
        for method in ["Prepare", "Stage"] {
            let reply = requests.once(method, "r1", call(Arc::clone(&count), false));
            reply.await.unwrap();
        }
        assert_eq!(count.load(Ordering::Relaxed), 2);
        for number in 0..KEPT {
            let id = format!("n{number}");
            let reply = requests.once("Prepare", &id, call(Arc::clone(&count), false));
            reply.await.unwrap();
        }
        let known = requests.known.lock().unwrap();
        assert_eq!((known.answers.len(), known.order.len()), (KEPT, KEPT));
        assert!(!known.answers.contains_key("Prepare r1"));
    }

    #[tokio::test]
    async fn a_call_without_an_id_is_refused() {
        let requests = Requests::default();
        let count = Arc::new(AtomicU32::new(0));
        assert!(
            requests
                .once("Prepare", "", call(Arc::clone(&count), false))
                .await
                .is_err()
        );
        assert_eq!(count.load(Ordering::Relaxed), 0);
    }
}
