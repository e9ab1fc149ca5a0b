// The WebSocket to the server: one question at a time, the newest wins; reconnects by itself.

export class Link {
  constructor(handlers) {
    this.handlers = handlers;
    this.waiting = false;
    this.next = null;
    this.moments = 0;
    this.#open();
  }

  #open() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.socket = new WebSocket(`${scheme}://${location.host}/ws`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.handlers.connection("connected");
    this.socket.onmessage = (event) => this.#take(event.data);
    this.socket.onclose = () => {
      this.waiting = false;
      this.handlers.connection("not connected, trying again");
      setTimeout(() => this.#open(), 1000);
    };
  }

  #take(data) {
    if (typeof data === "string") {
      const message = JSON.parse(data);
      this.handlers[message.kind](message);
      return;
    }
    const length = new DataView(data).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    this.moments += 1;
    this.waiting = false;
    this.handlers.moment(header, data, 4 + length);
    if (this.next) {
      const asked = this.next;
      this.next = null;
      this.show(asked);
    }
  }

  get ready() {
    return this.socket.readyState === WebSocket.OPEN;
  }

  get idle() {
    return this.ready && !this.waiting;
  }

  // Ask for a moment; while an answer is on its way only the newest wish is kept.
  show(ask) {
    if (!this.ready) return;
    if (this.waiting) {
      this.next = ask;
      return;
    }
    this.waiting = true;
    this.socket.send(JSON.stringify({ kind: "show", ...ask }));
  }

  why(block, offset) {
    if (!this.ready) return;
    this.socket.send(JSON.stringify({ kind: "why", block, offset_ns: offset }));
  }
}
