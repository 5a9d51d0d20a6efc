//! News of the engine about our containers, without end.

use super::{
    super::{
        RuntimeEvent,
        workload::{LABEL_INSTANCE, LABEL_WORKLOAD},
    },
    engine::{Engine, EngineError, QUESTION},
};
use bollard::{models::EventMessage, query_parameters::EventsOptionsBuilder};
use futures::stream::{self, BoxStream, StreamExt as _};
use jiff::{SignedDuration, Timestamp};
use std::{collections::HashMap, sync::Arc, time::Duration};

/// First and longest pause before the engine is tried again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How far back a subscription reaches, so that nothing falls between it and the first look.
const OVERLAP: SignedDuration = SignedDuration::from_secs(2);
/// What of a container's life is news.
const ACTIONS: [&str; 5] = ["create", "start", "die", "oom", "destroy"];

enum State {
    Away(Duration),
    Listening(BoxStream<'static, Result<EventMessage, bollard::errors::Error>>),
}

/// The news; see [`super::super::Runtime::events`].
pub(super) fn events(engine: Arc<Engine>, instance: String) -> BoxStream<'static, RuntimeEvent> {
    stream::unfold(State::Away(PAUSE.0), move |mut state| {
        let (engine, instance) = (Arc::clone(&engine), instance.clone());
        async move {
            loop {
                state = match state {
                    State::Away(pause) => match subscribe(&engine, &instance).await {
                        Ok(events) => return Some((RuntimeEvent::Resync, State::Listening(events))),
                        Err(_) => {
                            tokio::time::sleep(pause).await;
                            State::Away((pause * 2).min(PAUSE.1))
                        }
                    },
                    State::Listening(mut events) => match events.next().await {
                        Some(Ok(message)) => match workload(message) {
                            Some(name) => return Some((RuntimeEvent::Changed(name), State::Listening(events))),
                            None => State::Listening(events),
                        },
                        Some(Err(error)) => {
                            tracing::debug!(error = ?engine.failed(error), "the engine's news broke off");
                            State::Away(PAUSE.0)
                        }
                        None => {
                            engine.forget();
                            State::Away(PAUSE.0)
                        }
                    },
                };
            }
        }
    })
    .boxed()
}

/// Subscribes at an engine that has just answered, so that the stream is not an error waiting to be read.
async fn subscribe(
    engine: &Engine,
    instance: &str,
) -> Result<BoxStream<'static, Result<EventMessage, bollard::errors::Error>>, EngineError> {
    let since = (Timestamp::now() - OVERLAP).as_second().to_string();
    engine.call(QUESTION, |client| async move { client.ping().await }).await?;
    let filters = HashMap::from([
        ("type", vec!["container".to_owned()]),
        ("event", ACTIONS.map(str::to_owned).to_vec()),
        ("label", vec![format!("{LABEL_INSTANCE}={instance}")]),
    ]);
    let options = EventsOptionsBuilder::default().since(&since).filters(&filters).build();
    Ok(engine.client().await?.events(Some(options)).boxed())
}

fn workload(message: EventMessage) -> Option<String> {
    message.actor?.attributes?.remove(LABEL_WORKLOAD)
}
