//! What is asked of others, and told to them, for rollouts: hooks, Prometheus, commands.
//!
//! Owns how a call is made, how long it may take and how often it is tried. The loop hands out
//! [`Errand`]s and never waits for one; what comes of them it is told as
//! [`Event::Said`](crate::daemon::Event::Said). Must not know what follows from an answer.

mod command;
mod http;
mod prometheus;

use std::{future::Future, sync::Arc, time::Duration};

use serde_json::Value;
use tokio::{
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};

use self::http::{Client, Failure};
use crate::{
    config::model::{Hooks, Probe, ProbeAsk, Secret},
    daemon::Event,
    rollout::watch::Answer,
};

/// Calls that are made at a time: whoever does not answer must not take the host's memory.
const AT_ONCE: usize = 64;
/// An event is told so often before it is given up.
const TELL_TRIES: u32 = 5;
/// Between two tries; doubled each time.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest text of an answer that is shown.
const TEXT_CHARS: usize = 200;

/// Something to be done that may take its time.
#[derive(Debug)]
pub enum Errand {
    /// Tell a hook what has happened.
    Event {
        /// What is called.
        call: Call,
    },
    /// Ask a hook whether a step may be made.
    Confirm {
        /// Which rollout.
        rollout: String,
        /// Which of its questions.
        turn: u64,
        /// What is called.
        call: Call,
    },
    /// Ask one of a gate's.
    Measure {
        /// Which rollout.
        rollout: String,
        /// Which of its questions.
        turn: u64,
        /// Which of its gate's.
        index: usize,
        /// Who is asked, and how.
        probe: Box<Probe>,
        /// What it is about, for those who can be told.
        about: Vec<(&'static str, String)>,
    },
}

/// A call of a hook.
#[derive(Debug)]
pub struct Call {
    url: String,
    secret: Option<Secret>,
    timeout: Duration,
    body: Vec<u8>,
}

impl Call {
    fn new(url: &str, hooks: &Hooks, body: &Value) -> Self {
        let Hooks { confirm: _, event: _, secret, timeout } = hooks;
        let body = body.to_string().into_bytes();
        Self { url: url.to_owned(), secret: secret.clone(), timeout: *timeout, body }
    }
}

impl Errand {
    /// That something has happened.
    pub fn event(url: &str, hooks: &Hooks, body: &Value) -> Self {
        Self::Event { call: Call::new(url, hooks, body) }
    }

    /// Whether a step may be made.
    pub fn confirm(rollout: &str, turn: u64, url: &str, hooks: &Hooks, body: &Value) -> Self {
        Self::Confirm { rollout: rollout.to_owned(), turn, call: Call::new(url, hooks, body) }
    }

    /// What one of a gate's says.
    pub fn measure<const N: usize>(
        rollout: &str,
        turn: u64,
        index: usize,
        probe: &Probe,
        about: [(&'static str, String); N],
    ) -> Self {
        Self::Measure {
            rollout: rollout.to_owned(),
            turn,
            index,
            probe: Box::new(probe.clone()),
            about: about.into(),
        }
    }
}

/// What has come of an errand.
#[derive(Debug)]
pub enum Said {
    /// A hook has confirmed, or why not.
    Confirmed {
        /// Which rollout.
        rollout: String,
        /// Which of its questions.
        turn: u64,
        /// What it has said.
        answer: Result<(), String>,
    },
    /// One of a gate's has answered, or has not.
    Measured {
        /// Which rollout.
        rollout: String,
        /// Which of its questions.
        turn: u64,
        /// Which of its gate's.
        probe: usize,
        /// What it has said.
        answer: Answer,
    },
}

impl Said {
    /// Which rollout it is for.
    pub fn rollout(&self) -> &str {
        match self {
            Self::Confirmed { rollout, .. } | Self::Measured { rollout, .. } => rollout,
        }
    }

    /// Which of its questions it answers.
    pub fn turn(&self) -> u64 {
        match self {
            Self::Confirmed { turn, .. } | Self::Measured { turn, .. } => *turn,
        }
    }
}

/// Runs errands until nobody can hand out any more.
///
/// Events of all rollouts are told one after the other, so that they come in their order; what is
/// asked is asked at once.
pub async fn run(mut errands: mpsc::UnboundedReceiver<Errand>, events: mpsc::Sender<Event>) {
    let client = Client::default();
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let (tell, mut told) = mpsc::unbounded_channel::<Call>();
    let teller = client.clone();
    let telling = tokio::spawn(async move {
        while let Some(call) = told.recv().await {
            if let Err(failure) = tell_hook(&teller, &call).await {
                tracing::warn!(url = call.url, "a hook was not told what has happened: {failure}");
            }
        }
    });
    while let Some(errand) = errands.recv().await {
        let (client, events, places) = (client.clone(), events.clone(), Arc::clone(&places));
        match errand {
            Errand::Event { call } => drop(tell.send(call)),
            Errand::Confirm { rollout, turn, call } => {
                tokio::spawn(async move {
                    let answer = match places.try_acquire() {
                        Ok(_place) => confirm(&client, &call).await,
                        Err(_) => Err("too many calls are not answered".to_owned()),
                    };
                    let said = Said::Confirmed { rollout, turn, answer };
                    let _ = events.send(Event::Said(said)).await;
                });
            }
            Errand::Measure { rollout, turn, index, probe, about } => {
                tokio::spawn(async move {
                    let answer = match places.try_acquire() {
                        Ok(_place) => measure(&client, &probe, &about).await,
                        Err(_) => Answer::None("too many calls are not answered".to_owned()),
                    };
                    let said = Said::Measured { rollout, turn, probe: index, answer };
                    let _ = events.send(Event::Said(said)).await;
                });
            }
        }
    }
    drop(tell);
    telling.abort();
}

/// Tells a hook, again and again for a while.
async fn tell_hook(client: &Client, call: &Call) -> Result<(), Failure> {
    let mut pause = PAUSE;
    let mut tries = 1;
    loop {
        let status = post(client, call).await;
        match status {
            Ok(status) if (200..300).contains(&status) => return Ok(()),
            // It does not want it: a second time it would not either.
            Ok(status) if (400..500).contains(&status) && !matches!(status, 408 | 429) => {
                return Err(Failure::new(format!("it answers {status}")));
            }
            failed if tries >= TELL_TRIES => {
                return Err(failed.map_or_else(
                    |failure| failure,
                    |status| Failure::new(format!("it answers {status}")),
                ));
            }
            _ => {}
        }
        sleep(pause).await;
        (pause, tries) = (pause * 2, tries + 1);
    }
}

/// Asks a hook whether a step may be made.
async fn confirm(client: &Client, call: &Call) -> Result<(), String> {
    match post(client, call).await {
        Ok(status) if (200..300).contains(&status) => Ok(()),
        Ok(status) => Err(format!("it answers {status}")),
        Err(failure) => Err(failure.to_string()),
    }
}

async fn post(client: &Client, call: &Call) -> Result<u16, Failure> {
    let Call { url, secret, timeout: limit, body } = call;
    let sending = client.post(url, body.clone(), secret.as_ref());
    timeout(*limit, sending).await.unwrap_or_else(|_| Err(Failure::late(*limit)))
}

/// Asks one of a gate's, again at once where there is no answer.
async fn measure(client: &Client, probe: &Probe, about: &[(&'static str, String)]) -> Answer {
    let Probe { ask, timeout: limit, retries, .. } = probe;
    let once = || async {
        let asked: std::pin::Pin<Box<dyn Future<Output = Answer> + Send>> = match ask {
            ProbeAsk::Prometheus { url, query, above } => {
                Box::pin(prometheus::ask(client, url, query, *above))
            }
            ProbeAsk::Command(words) => Box::pin(command::run(words, about)),
            ProbeAsk::Webhook(url) => Box::pin(webhook(client, url, about)),
        };
        timeout(*limit, asked).await.unwrap_or_else(|_| {
            Answer::None(format!("no answer within {}", humantime::format_duration(*limit)))
        })
    };
    let mut pause = PAUSE;
    let mut answer = once().await;
    for _ in 0..*retries {
        if !matches!(answer, Answer::None(_)) {
            break;
        }
        sleep(pause).await;
        pause *= 2;
        answer = once().await;
    }
    shortened(answer)
}

/// 2xx is good, and what says that the request is to blame is bad; anything else says nothing.
async fn webhook(client: &Client, url: &str, about: &[(&'static str, String)]) -> Answer {
    let body: serde_json::Map<String, Value> = about
        .iter()
        .map(|(key, value)| {
            (key.trim_start_matches("CANARY_").to_lowercase(), value.clone().into())
        })
        .collect();
    match client.post(url, Value::Object(body).to_string().into_bytes(), None).await {
        Ok(status @ 200..=299) => Answer::Good(format!("status {status}")),
        Ok(status @ (408 | 429)) => Answer::None(format!("status {status}")),
        Ok(status @ 400..=499) => Answer::Bad(format!("status {status}")),
        Ok(status) => Answer::None(format!("status {status}")),
        Err(failure) => Answer::None(failure.to_string()),
    }
}

fn shortened(answer: Answer) -> Answer {
    let short = |text: String| text.chars().take(TEXT_CHARS).collect();
    match answer {
        Answer::Good(text) => Answer::Good(short(text)),
        Answer::Bad(text) => Answer::Bad(short(text)),
        Answer::None(text) => Answer::None(short(text)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// A server that answers with these, one after the other, the last again and again; with 0 it
    /// answers nothing. And how often it was called.
    async fn server(statuses: &'static [u16]) -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/", listener.local_addr().expect("an address"));
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&calls);
        tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let call = counter.fetch_add(1, Ordering::SeqCst);
                let status = statuses.get(call).or(statuses.last()).copied().unwrap_or(0);
                if status != 0 {
                    let answer = format!(
                        "HTTP/1.1 {status} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                    );
                    let _ = stream.write_all(answer.as_bytes()).await;
                }
                open.push(stream);
            }
        });
        (url, calls)
    }

    fn probe(ask: ProbeAsk, timeout_ms: u64, retries: u32) -> Probe {
        Probe {
            ask,
            interval: Duration::from_secs(1),
            timeout: Duration::from_millis(timeout_ms),
            retries,
            rise: 1,
            fall: 1,
            observe: false,
        }
    }

    #[tokio::test]
    async fn an_event_is_told_again_until_it_is_taken_or_refused() {
        let hooks = Hooks { timeout: Duration::from_secs(20), ..Hooks::default() };
        for (statuses, taken, calls) in
            [(&[500, 429, 204][..], true, 3), (&[404], false, 1), (&[200], true, 1)]
        {
            let (url, called) = server(statuses).await;
            let call = Call::new(&url, &hooks, &serde_json::json!({"event": "step"}));
            let told = tell_hook(&Client::default(), &call).await;
            assert_eq!(told.is_ok(), taken, "{statuses:?}: {told:?}");
            assert_eq!(called.load(Ordering::SeqCst), calls, "{statuses:?}");
        }
    }

    #[tokio::test]
    async fn who_does_not_answer_is_asked_again_and_who_says_no_is_not() {
        for (statuses, retries, word, calls) in [
            (&[500, 408, 204][..], 2, "good", 3),
            (&[503], 1, "no answer", 2),
            (&[417], 2, "bad", 1),
            (&[429, 404], 2, "bad", 2),
        ] {
            let (url, called) = server(statuses).await;
            let probe = probe(ProbeAsk::Webhook(url), 20_000, retries);
            let answer = measure(&Client::default(), &probe, &[]).await;
            assert_eq!(answer.word(), word, "{statuses:?}: {answer:?}");
            assert_eq!(called.load(Ordering::SeqCst), calls, "{statuses:?}");
        }
        let (url, called) = server(&[0]).await;
        let answer = measure(&Client::default(), &probe(ProbeAsk::Webhook(url), 200, 1), &[]).await;
        assert_eq!(answer, Answer::None("no answer within 200ms".to_owned()));
        assert_eq!(called.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_command_says_it_by_its_exit_code() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        for (command, word) in [
            ("/bin/true", "good"),
            ("/bin/false", "bad"),
            ("/usr/bin/env sh -c exit\u{a0}75", "no answer"),
            ("/nowhere/judge", "no answer"),
        ] {
            let words: Vec<String> =
                words(command).into_iter().map(|word| word.replace('\u{a0}', " ")).collect();
            let answer =
                measure(&Client::default(), &probe(ProbeAsk::Command(words), 20_000, 0), &[]).await;
            assert_eq!(answer.word(), word, "{command}: {answer:?}");
        }
        let slow = probe(ProbeAsk::Command(words("/bin/sleep 60")), 200, 0);
        let answer = measure(&Client::default(), &slow, &[]).await;
        assert_eq!(answer, Answer::None("no answer within 200ms".to_owned()));
    }
}
