//! russh's callbacks for one connection. They are awaited by the loop that serves all its channels, so they
//! answer at once, note what is asked and leave the work to tasks; the exceptions say why.

use super::{
    auth::Authentication,
    client::{Client, Ends, Kind},
    connection::Server,
    flow::Windows,
    forward::direct,
    inbox::Inbox,
    limits::UserChannel,
    listening::{Listen, listen},
    outlet::Outlet,
    session::{self, Answer, SFTP},
    setup::{Setup, Start},
};
use crate::config::Config;
use mlad::channel::{Open, PtySize};
use russh::{
    Channel, ChannelId, ChannelOpenFailure, Pty, Sig,
    keys::Certificate,
    server::{Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Response, Session, VerifiedPublicKey},
};
use std::{
    collections::HashMap,
    sync::{Arc, atomic::AtomicUsize},
};
use tokio::sync::oneshot;
use tracing::Span;

/// Longest command, in bytes: a frame to the agent must hold it.
const MAX_COMMAND: usize = 200 * 1024;
/// Longest path, host name or name of a subsystem, in bytes.
const MAX_NAME: usize = 4096;
/// Longest name of a signal, in bytes.
const MAX_SIGNAL: usize = 32;

/// Why a channel is not opened (RFC 4254 section 5.1).
const ADMINISTRATIVELY_PROHIBITED: u32 = 1;

/// The callbacks.
pub(super) struct Callbacks {
    server: Arc<Server>,
    config: Arc<Config>,
    ends: Ends,
    span: Span,
    authentication: Authentication,
    /// Takes the client once it has logged in.
    arrival: Option<oneshot::Sender<Arc<Client>>>,
    client: Option<Arc<Client>>,
    windows: Windows,
    /// Sessions that have not started anything yet.
    setups: HashMap<ChannelId, (Setup, Outlet)>,
}

impl Callbacks {
    /// Counts in `refused` what does not let the client in.
    pub(super) fn new(
        server: Arc<Server>,
        config: Arc<Config>,
        ends: Ends,
        span: Span,
        arrival: oneshot::Sender<Arc<Client>>,
        refused: Arc<AtomicUsize>,
    ) -> Self {
        let authentication = Authentication::new(Arc::clone(&server), Arc::clone(&config), ends.peer, refused);
        Self {
            server,
            config,
            ends,
            span,
            authentication,
            arrival: Some(arrival),
            client: None,
            windows: Windows::default(),
            setups: HashMap::new(),
        }
    }

    /// russh calls what needs a login only after one.
    fn client(&self) -> Result<&Arc<Client>, russh::Error> {
        self.client.as_ref().ok_or(russh::Error::NotAuthenticated)
    }

    /// Counts a channel that is being opened; none if there are too many.
    fn admit(&mut self, id: ChannelId, kind: Kind) -> Result<Option<(Arc<Inbox>, UserChannel)>, russh::Error> {
        let client = Arc::clone(self.client()?);
        let admitted = client.add_channel(id, kind);
        if admitted.is_none() {
            tracing::info!(parent: &self.span, "refused a channel: too many are open");
        } else {
            self.count(&client, id);
        }
        Ok(admitted)
    }

    /// Counts a channel's window; false if it was counted already.
    fn count(&mut self, client: &Client, id: ChannelId) -> bool {
        // Of a channel that we close first, russh does not tell us the client's close.
        self.windows.keep(|id| client.inbox(id).is_some());
        self.windows.open(id)
    }

    /// Counts data that has come.
    fn receive(&mut self, id: ChannelId, bytes: usize) -> Result<Arc<Client>, russh::Error> {
        let client = Arc::clone(self.client()?);
        if self.windows.receive(id, bytes, &client.meter) {
            return Ok(client);
        }
        tracing::warn!(parent: &self.span, "the client sends more than its windows allow; disconnected");
        Err(russh::Error::Inconsistent)
    }

    async fn open_direct(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        open: Open,
    ) -> Result<(), russh::Error> {
        let id = channel.id();
        if !self.client()?.forwarding().local {
            tracing::info!(parent: &self.span, "refused to forward a connection: this login may not");
            reply.reject(not_allowed()).await;
            return Ok(());
        }
        let Some(admitted) = self.admit(id, Kind::Forwarded)? else {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        };
        let client = Arc::clone(self.client()?);
        client.spawn_channel(id, direct(Arc::clone(&client), channel, admitted, reply, open));
        Ok(())
    }

    /// Answers yes and starts it: a yes that comes after a window change is lost on the client.
    fn start(&mut self, id: ChannelId, start: Start, session: &mut Session) -> Result<(), russh::Error> {
        let client = Arc::clone(self.client()?);
        let Some((mut setup, outlet)) = self.setups.remove(&id) else {
            return session.channel_failure(id);
        };
        let Some(start) = client.grant.start(&mut setup, start) else {
            return session.channel_failure(id);
        };
        session.channel_success(id)?;
        client.spawn_channel(id, session::serve(Arc::clone(&client), outlet, setup, start, Answer::Given));
        Ok(())
    }

    /// A subsystem of the image: started where a workspace runs, and answered as its agent does; the answer comes
    /// late, which a client notices only if it asks for something else meanwhile. No workspace is started for one
    /// that may not be there.
    async fn start_subsystem(&mut self, id: ChannelId, name: &str, session: &mut Session) -> Result<(), russh::Error> {
        let client = Arc::clone(self.client()?);
        let runs = self.setups.contains_key(&id) && client.workplace.join_running().await.is_some();
        let Some((setup, outlet)) = runs.then(|| self.setups.remove(&id)).flatten() else {
            return session.channel_failure(id);
        };
        let start = Start::Subsystem(name.into());
        client.spawn_channel(id, session::serve(Arc::clone(&client), outlet, setup, start, Answer::Owed));
        Ok(())
    }

    fn answer(id: ChannelId, yes: bool, session: &mut Session) -> Result<(), russh::Error> {
        if yes { session.channel_success(id) } else { session.channel_failure(id) }
    }
}

impl Drop for Callbacks {
    fn drop(&mut self) {
        if let Some(client) = &self.client {
            client.end_all();
        }
    }
}

impl Handler for Callbacks {
    type Error = russh::Error;

    async fn auth_publickey_offered(&mut self, _user: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, russh::Error> {
        Ok(self.authentication.offered(offer).await)
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, russh::Error> {
        Ok(self.authentication.proven(user, key.public_key).await)
    }

    async fn auth_openssh_certificate(&mut self, user: &str, certificate: &Certificate) -> Result<Auth, russh::Error> {
        Ok(self.authentication.certified(user, certificate).await)
    }

    async fn auth_keyboard_interactive<'a>(
        &'a mut self,
        user: &str,
        _submethods: &str,
        response: Option<Response<'a>>,
    ) -> Result<Auth, russh::Error> {
        let typed = response.map(|mut answers| answers.next().map(|it| String::from_utf8_lossy(&it).into_owned()));
        Ok(self.authentication.prompted(user, typed).await)
    }

    async fn auth_succeeded(&mut self, session: &mut Session) -> Result<(), russh::Error> {
        let login = self.authentication.take_login().ok_or(russh::Error::NotAuthenticated)?;
        tracing::info!(parent: &self.span, user = login.user.name, key = %login.credential, "logged in");
        let client = self.server.admit(Arc::clone(&self.config), login, session.handle(), self.ends, self.span.clone());
        if let Some(arrival) = self.arrival.take() {
            _ = arrival.send(Arc::clone(&client));
        }
        self.client = Some(client);
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        let Some((inbox, counted)) = self.admit(channel.id(), Kind::Session)? else {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        };
        let outlet = self.client()?.outlet(channel, inbox, counted);
        self.setups.insert(outlet.id(), (Setup::default(), outlet));
        reply.accept().await;
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        if host.len() > MAX_NAME {
            reply.reject(ChannelOpenFailure::ConnectFailed).await;
            return Ok(());
        }
        self.open_direct(channel, reply, Open::DirectTcpip { host: host.into(), port }).await
    }

    async fn channel_open_direct_streamlocal(
        &mut self,
        channel: Channel<Msg>,
        path: &str,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        if path.len() > MAX_NAME {
            reply.reject(ChannelOpenFailure::ConnectFailed).await;
            return Ok(());
        }
        self.open_direct(channel, reply, Open::DirectStreamlocal { path: path.into() }).await
    }

    /// The client has taken a channel that a task of ours opens; its queue must be there before any data. russh
    /// passes on also those that a client sends again, or for a channel it has opened itself.
    async fn channel_open_confirmation(
        &mut self,
        id: ChannelId,
        _: u32,
        _: u32,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        let client = Arc::clone(self.client()?);
        if self.count(&client, id) {
            client.await_task(id);
        }
        Ok(())
    }

    async fn channel_close(&mut self, id: ChannelId, _: &mut Session) -> Result<(), russh::Error> {
        self.setups.remove(&id);
        self.windows.close(id);
        self.client()?.channel_closed(id);
        Ok(())
    }

    async fn channel_eof(&mut self, id: ChannelId, _: &mut Session) -> Result<(), russh::Error> {
        if let Some(inbox) = self.client()?.inbox(id) {
            inbox.eof();
        }
        Ok(())
    }

    async fn data(&mut self, id: ChannelId, data: &[u8], _: &mut Session) -> Result<(), russh::Error> {
        let client = self.receive(id, data.len())?;
        if let Some(inbox) = client.inbox(id) {
            inbox.push(data);
        }
        // Waits a millisecond, and only while this client is throttled: see `flow`.
        client.meter.pace().await;
        Ok(())
    }

    /// There is no input but standard input; it counts all the same.
    async fn extended_data(&mut self, id: ChannelId, _: u32, data: &[u8], _: &mut Session) -> Result<(), russh::Error> {
        self.receive(id, data.len()).map(drop)
    }

    fn adjust_window(&mut self, _: ChannelId, current: u32) -> u32 {
        match &self.client {
            Some(client) => self.windows.refill(current, &client.meter),
            None => current,
        }
    }

    async fn pty_request(
        &mut self,
        id: ChannelId,
        term: &str,
        columns: u32,
        rows: u32,
        width: u32,
        height: u32,
        modes: &[(Pty, u32)],
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        let size = PtySize { columns, rows, width, height };
        let allowed = self.client()?.grant.terminal;
        let setup = self.setups.get_mut(&id).filter(|_| allowed);
        let taken = setup.is_some_and(|(setup, _)| setup.set_terminal(term, size, modes));
        Self::answer(id, taken, session)
    }

    async fn env_request(
        &mut self,
        id: ChannelId,
        name: &str,
        value: &str,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        let allowed = self.client()?.grant.allows_variable(name);
        let setup = self.setups.get_mut(&id).filter(|_| allowed);
        let taken = setup.is_some_and(|(setup, _)| setup.set_variable(name, value));
        Self::answer(id, taken, session)
    }

    async fn x11_request(
        &mut self,
        id: ChannelId,
        _: bool,
        _: &str,
        _: &str,
        _: u32,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        session.channel_failure(id)
    }

    async fn agent_request(&mut self, id: ChannelId, _: &mut Session) -> Result<bool, russh::Error> {
        let allowed = self.client()?.forwarding().agent;
        let Some((setup, _)) = self.setups.get_mut(&id) else { return Ok(false) };
        setup.key_agent = allowed;
        Ok(allowed)
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut Session) -> Result<(), russh::Error> {
        self.start(id, Start::Shell, session)
    }

    async fn exec_request(&mut self, id: ChannelId, command: &[u8], session: &mut Session) -> Result<(), russh::Error> {
        if command.len() > MAX_COMMAND {
            return session.channel_failure(id);
        }
        self.start(id, Start::Exec(command.to_vec().into()), session)
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        name: &str,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        if name.len() > MAX_NAME {
            return session.channel_failure(id);
        }
        if name == SFTP || self.client()?.grant.command.is_some() {
            return self.start(id, Start::Subsystem(name.into()), session);
        }
        self.start_subsystem(id, name, session).await
    }

    async fn window_change_request(
        &mut self,
        id: ChannelId,
        columns: u32,
        rows: u32,
        width: u32,
        height: u32,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        let size = PtySize { columns, rows, width, height };
        if let Some((setup, _)) = self.setups.get_mut(&id) {
            if let Some(terminal) = &mut setup.terminal {
                terminal.size = size;
            }
        } else if let Some(inbox) = self.client()?.inbox(id) {
            inbox.resize(size);
        }
        Ok(())
    }

    async fn signal(&mut self, id: ChannelId, signal: Sig, _: &mut Session) -> Result<(), russh::Error> {
        let name = signal_name(signal);
        if name.len() <= MAX_SIGNAL
            && let Some(inbox) = self.client()?.inbox(id)
        {
            inbox.signal(name);
        }
        Ok(())
    }

    /// Waits for the workspace's agent where one runs, which is asked on this host and has ten seconds: the
    /// answer has to be the true one, and russh takes none later. Never for a workspace: see `listening`.
    async fn tcpip_forward(&mut self, address: &str, port: &mut u32, _: &mut Session) -> Result<bool, russh::Error> {
        if address.len() > MAX_NAME {
            return Ok(false);
        }
        let bound = listen(self.client()?, Listen::Tcp { address: address.into(), port: *port }).await;
        if let (0, Some(bound)) = (*port, bound) {
            *port = bound;
        }
        Ok(bound.is_some())
    }

    async fn cancel_tcpip_forward(&mut self, address: &str, port: u32, _: &mut Session) -> Result<bool, russh::Error> {
        Ok(self.client()?.listeners.cancel(&Listen::Tcp { address: address.into(), port }))
    }

    /// Waits as [`Self::tcpip_forward`] does.
    async fn streamlocal_forward(&mut self, path: &str, _: &mut Session) -> Result<bool, russh::Error> {
        Ok(path.len() <= MAX_NAME && listen(self.client()?, Listen::Socket(path.into())).await.is_some())
    }

    async fn cancel_streamlocal_forward(&mut self, path: &str, _: &mut Session) -> Result<bool, russh::Error> {
        Ok(self.client()?.listeners.cancel(&Listen::Socket(path.into())))
    }
}

fn not_allowed() -> ChannelOpenFailure {
    let reason = "this login may not forward connections; ask an administrator".into();
    ChannelOpenFailure::Other { code: ADMINISTRATIVELY_PROHIBITED, reason }
}

fn signal_name(signal: Sig) -> String {
    match signal {
        Sig::Custom(name) => name,
        known => format!("{known:?}"),
    }
}
