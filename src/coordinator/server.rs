//! Accepts agents on 20004 and carries messages between them and the hub.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::CoordinatorError;
use super::hub::{self, Event, Hub};
use crate::clock;
use crate::config::coordinator::CoordinatorSettings;
use crate::config::limits::{HANDSHAKE_SECONDS, HANDSHAKES_MAX};
use crate::control::api::RoleStatus;
use crate::crypto::messages;
use crate::crypto::pki::Role;
use crate::crypto::tls::{ALPN_CONSISTENCY, Credentials, peer_identity};
use crate::model::{MachineId, Name};
use crate::observe::http::Readiness;
use crate::observe::metrics;
use crate::wire::PROTOCOL;
use crate::wire::consistency::{CoordinatorMessage, MemberMessage};

/// Messages that may wait for a member.
const OUTBOX: usize = 64;
/// A member hears something at least this often.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// Messages a member may send in a second: a round needs three, a report one.
const MESSAGES_PER_SECOND: u32 = 200;

/// What the thread shares with the process.
pub(super) struct Parts {
    pub(super) view: Arc<Mutex<RoleStatus>>,
    pub(super) readiness: Readiness,
    pub(super) stop: Arc<Notify>,
    pub(super) asks: mpsc::Sender<Event>,
    pub(super) events: mpsc::Receiver<Event>,
}

/// Runs until told to stop.
pub(super) async fn run(settings: CoordinatorSettings, parts: Parts, opened: SyncSender<Result<SocketAddr, CoordinatorError>>) {
    let (hub, acceptor, listener, address) = match open(&settings, &parts).await {
        Ok(open) => open,
        Err(e) => return drop(opened.send(Err(e))),
    };
    let _ = opened.send(Ok(address));
    parts.readiness.set(true);
    tracing::info!(listen = %address, "coordinator is running");
    tokio::select! {
        () = hub.run(parts.events) => {}
        () = accept(listener, acceptor, settings.consistency.connections_max, parts.asks) => {}
        () = parts.stop.notified() => tracing::info!("coordinator stops; members let go by themselves"),
    }
    parts.readiness.set(false);
}

type Open = (Hub, TlsAcceptor, TcpListener, SocketAddr);

async fn open(settings: &CoordinatorSettings, parts: &Parts) -> Result<Open, CoordinatorError> {
    crate::storage::uring::create_dir_durable(&settings.state)?;
    let credentials = Credentials::load(&settings.tls, Role::Coordinator)?;
    metrics::disk_part(metrics::CERTIFICATE_EXPIRY, "", "role", Role::Coordinator.as_str(), credentials.expires_in_seconds as f64);
    let acceptor = TlsAcceptor::from(Arc::new(credentials.server(ALPN_CONSISTENCY)?));
    let hub = Hub::open(settings, &credentials, parts.view.clone())?;
    let at = settings.consistency.listen;
    let listener = TcpListener::bind(at).await.map_err(|e| {
        let hint = "stop the program that uses the port or change [consistency] listen";
        io::Error::new(e.kind(), format!("cannot listen on {at} for members: {e}; {hint}"))
    })?;
    let address = listener.local_addr()?;
    Ok((hub, acceptor, listener, address))
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, connections_max: usize, hub: mpsc::Sender<Event>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let (room, mut next) = (Rc::new(Semaphore::new(connections_max)), 0);
    loop {
        let Ok(permit) = handshakes.clone().acquire_owned().await else { return };
        let (tcp, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "could not accept a member");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        next += 1;
        let (id, hub, acceptor, room) = (next, hub.clone(), acceptor.clone(), room.clone());
        tokio::task::spawn_local(async move {
            let Ok(_place) = room.try_acquire() else { return metrics::count_reason(metrics::REFUSED, "too-many-connections") };
            let limit = Duration::from_secs(HANDSHAKE_SECONDS);
            let shake = tokio::time::timeout(limit, handshake(&acceptor, tcp)).await;
            drop(permit);
            match shake {
                Ok(Ok((tls, machine))) => serve(tls, machine, id, hub).await,
                Ok(Err(error)) => {
                    metrics::count_reason(metrics::REFUSED, "handshake");
                    tracing::info!(%peer, %error, "refused a connection on the coordinator's port");
                }
                Err(_) => metrics::count_reason(metrics::REFUSED, "handshake-timeout"),
            }
        });
    }
}

async fn handshake(acceptor: &TlsAcceptor, tcp: TcpStream) -> io::Result<(TlsStream<TcpStream>, Name)> {
    tcp.set_nodelay(true)?;
    let mut tls = acceptor.accept(tcp).await?;
    let name = peer_identity(tls.get_ref().1.peer_certificates(), Role::Agent).map_err(io::Error::other)?.name;
    let refusal = match messages::read(&mut tls).await.map_err(io::Error::other)? {
        MemberMessage::Hello { protocol, .. } if protocol != PROTOCOL => {
            format!("protocol {protocol} is not known here (this is version {PROTOCOL}): upgrade the older side")
        }
        MemberMessage::Hello { machine, .. } if machine == MachineId::from_name(&name) => {
            messages::write(&mut tls, &CoordinatorMessage::Welcome).await.map_err(io::Error::other)?;
            return Ok((tls, name));
        }
        MemberMessage::Hello { .. } => format!("the certificate names machine {name}, the agent says it is another one"),
        _ => "the first message is no greeting".to_owned(),
    };
    let _ = messages::write(&mut tls, &CoordinatorMessage::Goodbye { message: refusal.clone() }).await;
    Err(io::Error::other(refusal))
}

async fn serve(tls: TlsStream<TcpStream>, name: Name, id: u64, hub: mpsc::Sender<Event>) {
    let (mut read, mut write) = tokio::io::split(tls);
    let (outbox, mut waiting) = mpsc::channel(OUTBOX);
    let connected = Event::Connected { name: name.clone(), id, outbox };
    if hub.send(connected).await.is_err() {
        return;
    }
    tracing::info!(machine = %name, "member connected");
    let listen = async {
        let (mut second, mut heard) = (clock::now(), 0);
        loop {
            let message: MemberMessage = match messages::read(&mut read).await {
                Ok(message) => message,
                Err(error) => return error.to_string(),
            };
            if clock::now().since(second) >= Duration::from_secs(1) {
                (second, heard) = (clock::now(), 0);
            }
            heard += 1;
            if heard > MESSAGES_PER_SECOND {
                metrics::count_reason(metrics::REFUSED, "consistency");
                return format!("it sent more than {MESSAGES_PER_SECOND} messages in a second");
            }
            if hub.send(Event::Message { name: name.clone(), id, message }).await.is_err() {
                return "the coordinator stops".to_owned();
            }
        }
    };
    let speak = async {
        loop {
            let message = match tokio::time::timeout(ALIVE_EVERY, waiting.recv()).await {
                Ok(Some(message)) => message,
                Ok(None) => return hub::REPLACED.to_owned(),
                Err(_) => CoordinatorMessage::Alive,
            };
            if let Err(error) = messages::write(&mut write, &message).await {
                return error.to_string();
            }
        }
    };
    let reason = tokio::select! {
        reason = listen => reason,
        reason = speak => reason,
    };
    tracing::info!(machine = %name, reason, "member left");
    let _ = hub.send(Event::Gone { name, id }).await;
    let goodbye = CoordinatorMessage::Goodbye { message: reason };
    let _ = tokio::time::timeout(Duration::from_secs(1), messages::write(&mut write, &goodbye)).await;
}
