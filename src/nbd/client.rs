//! A client with one request at a time, for the quickstart's workload and for tests. Not a data path.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};

use super::Stream;
use super::protocol::{HANDSHAKE_FLAGS, MAGIC_GREETING, MAGIC_OPTION, MAGIC_OPTION_REPLY, MAGIC_SIMPLE, Request, command, option, reply};
use crate::model::{Address, Extent};

/// A connection to an export.
pub struct Client {
    stream: BufReader<Stream>,
    size: u64,
    cookie: u64,
}

impl Client {
    /// Connects to the export `name` (empty: the default one).
    ///
    /// # Errors
    /// Those of the socket, and `InvalidData` if the server does not speak the protocol or has no such export.
    pub async fn connect(address: &Address, name: &str) -> io::Result<Self> {
        let mut stream = BufReader::new(Stream::connect(address).await?);
        if stream.read_u64().await? != MAGIC_GREETING || stream.read_u64().await? != MAGIC_OPTION {
            return Err(bad("not an NBD server"));
        }
        let flags = stream.read_u16().await? & HANDSHAKE_FLAGS;
        stream.write_all(&u32::from(flags).to_be_bytes()).await?;
        let mut go = Vec::new();
        go.extend_from_slice(&MAGIC_OPTION.to_be_bytes());
        go.extend_from_slice(&option::GO.to_be_bytes());
        go.extend_from_slice(&(name.len() as u32 + 6).to_be_bytes());
        go.extend_from_slice(&(name.len() as u32).to_be_bytes());
        go.extend_from_slice(name.as_bytes());
        go.extend_from_slice(&0u16.to_be_bytes());
        stream.write_all(&go).await?;
        let mut size = None;
        loop {
            if stream.read_u64().await? != MAGIC_OPTION_REPLY {
                return Err(bad("an option reply without its magic"));
            }
            let (_, kind, len) = (stream.read_u32().await?, stream.read_u32().await?, stream.read_u32().await?);
            let mut body = vec![0; len.min(65536) as usize];
            stream.read_exact(&mut body).await?;
            match kind {
                reply::ACK => break,
                reply::INFO if body.starts_with(&[0, 0]) && body.len() >= 10 => size = body[2..10].try_into().ok().map(u64::from_be_bytes),
                reply::INFO => {}
                _ => return Err(bad("the server refused the export")),
            }
        }
        let size = size.ok_or_else(|| bad("the server did not tell the size"))?;
        Ok(Self { stream, size, cookie: 0 })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads an extent.
    ///
    /// # Errors
    /// Those of the socket; the server's as `Other`.
    pub async fn read(&mut self, extent: Extent) -> io::Result<Vec<u8>> {
        self.request(command::READ, 0, extent, &[]).await?;
        let mut data = vec![0; extent.len as usize];
        self.stream.read_exact(&mut data).await?;
        Ok(data)
    }

    /// Writes bytes; durable when answered if `fua`.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub async fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
        self.request(command::WRITE, u16::from(fua), Extent::new(offset, data.len() as u64), data).await
    }

    /// Makes an extent read as zeroes.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub async fn zero(&mut self, extent: Extent) -> io::Result<()> {
        self.request(command::WRITE_ZEROES, 0, extent, &[]).await
    }

    /// Makes everything answered durable.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub async fn flush(&mut self) -> io::Result<()> {
        self.request(command::FLUSH, 0, Extent::new(0, 0), &[]).await
    }

    async fn request(&mut self, kind: u16, flags: u16, extent: Extent, data: &[u8]) -> io::Result<()> {
        self.cookie += 1;
        let request = Request { flags, kind, cookie: self.cookie, offset: extent.offset, len: extent.len as u32 };
        let mut out = Vec::with_capacity(28 + data.len());
        out.extend_from_slice(&request.encode());
        out.extend_from_slice(data);
        self.stream.write_all(&out).await?;
        if self.stream.read_u32().await? != MAGIC_SIMPLE {
            return Err(bad("a reply without its magic"));
        }
        let error = self.stream.read_u32().await?;
        if self.stream.read_u64().await? != self.cookie {
            return Err(bad("a reply to another request"));
        }
        if error == 0 { Ok(()) } else { Err(io::Error::other(format!("the server answered with NBD error {error}"))) }
    }
}

fn bad(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
